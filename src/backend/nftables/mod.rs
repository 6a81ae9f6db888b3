pub mod objects;
pub mod scaffold;
pub mod script;
