pub mod check;
pub mod listing;
pub mod rules;
pub mod script;
