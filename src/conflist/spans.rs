//! JSON with the place of every value in its text, so that one value can be changed and everything
//! else stays as somebody wrote it.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// A place in a text. Both count from 1; columns count characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Position {
    pub line: usize,
    pub column: usize,
}

impl Position {
    /// The place of a byte.
    #[must_use]
    pub fn of(text: &str, byte: usize) -> Self {
        let before = text.get(..byte).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Position {
            line: before.matches('\n').count() + 1,
            column: before.get(line_start..).unwrap_or_default().chars().count() + 1,
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}", self.line, self.column)
    }
}

/// Where something stands: in another file than the one that is looked at, if that has a name here.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Place {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    #[serde(flatten)]
    pub position: Position,
}

impl Place {
    #[must_use]
    pub fn of(text: &str, json: &Json) -> Self {
        Position::of(text, json.span.start).into()
    }
}

impl From<Position> for Place {
    fn from(position: Position) -> Self {
        Place { file: None, position }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}, ", file.display())?;
        }
        self.position.fmt(f)
    }
}

/// Why a text cannot be used, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {reason}")]
pub struct Refusal {
    pub place: Place,
    pub reason: String,
}

impl Refusal {
    /// Of what stands in another file.
    #[must_use]
    pub fn in_file(mut self, path: &Path) -> Self {
        self.place.file = Some(path.to_owned());
        self
    }
}

/// A value and where it stands, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Json {
    pub span: Range<usize>,
    pub kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    Object(Vec<Member>),
    Array(Vec<Json>),
    String(String),
    Bool(bool),
    Null,
    Number,
}

/// One `"key": value` of an object; `key_span` includes the quotes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub key: String,
    pub key_span: Range<usize>,
    pub value: Json,
}

impl Json {
    /// Reads one value that fills the text.
    ///
    /// # Errors
    ///
    /// What is no JSON, and where. Nesting is limited to 128 levels.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        if let Err(error) = serde_json::from_str::<Value>(text) {
            // Its own text repeats the place.
            let reason = error.to_string();
            let reason = reason.split(" at line ").next().unwrap_or_default();
            let position = Position { line: error.line().max(1), column: error.column().max(1) };
            let reason = format!("this is not JSON: {reason}");
            return Err(Refusal { place: position.into(), reason });
        }
        let mut reader = Reader { text, at: 0 };
        reader.skip_space();
        reader.value().ok_or_else(|| Refusal {
            place: Position::of(text, reader.at).into(),
            reason: "this is not JSON".into(),
        })
    }

    /// Of `text`, in which this stands.
    #[must_use]
    pub fn refusal(&self, text: &str, reason: impl Into<String>) -> Refusal {
        Refusal { place: Place::of(text, self), reason: reason.into() }
    }

    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match &self.kind {
            Kind::String(text) => Some(text),
            _ => None,
        }
    }

    #[must_use]
    pub fn members(&self) -> Option<&[Member]> {
        match &self.kind {
            Kind::Object(members) => Some(members),
            _ => None,
        }
    }

    /// The member that counts, as Go decodes into a map: spelt exactly, the last of several.
    #[must_use]
    pub fn exact(&self, key: &str) -> Option<&Member> {
        self.members()?.iter().rev().find(|member| member.key == key)
    }

    /// The member that counts, as Go decodes into a struct: in any case, the last of several; `null`
    /// changes nothing.
    #[must_use]
    pub fn folded(&self, key: &str) -> Option<&Member> {
        let matches = |member: &&Member| {
            member.key.eq_ignore_ascii_case(key) && member.value.kind != Kind::Null
        };
        self.members()?.iter().rev().find(matches)
    }
}

/// Reads a text that is known to be JSON; `None` would mean that it is not.
struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl Reader<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip_space(&mut self) {
        self.skip_while(|byte| byte.is_ascii_whitespace());
    }

    fn skip_while(&mut self, matches: impl Fn(u8) -> bool) {
        while self.peek().is_some_and(&matches) {
            self.at += 1;
        }
    }

    /// Steps over `byte` if it comes next, whitespace aside.
    fn eat(&mut self, byte: u8) -> bool {
        self.skip_space();
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn value(&mut self) -> Option<Json> {
        let start = self.at;
        let kind = match self.peek()? {
            b'{' => Kind::Object(self.items(b'}', Self::member)?),
            b'[' => Kind::Array(self.items(b']', Self::value)?),
            b'"' => Kind::String(self.string()?),
            first => {
                self.skip_while(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
                match first {
                    b't' | b'f' => Kind::Bool(first == b't'),
                    b'n' => Kind::Null,
                    _ => Kind::Number,
                }
            }
        };
        Some(Json { span: start..self.at, kind })
    }

    fn items<T>(&mut self, end: u8, item: fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        self.at += 1;
        let mut items = Vec::new();
        if self.eat(end) {
            return Some(items);
        }
        loop {
            self.skip_space();
            items.push(item(self)?);
            if self.eat(end) {
                return Some(items);
            }
            if !self.eat(b',') {
                return None;
            }
        }
    }

    fn member(&mut self) -> Option<Member> {
        let start = self.at;
        let key = self.string()?;
        let key_span = start..self.at;
        if !self.eat(b':') {
            return None;
        }
        self.skip_space();
        Some(Member { key, key_span, value: self.value()? })
    }

    fn string(&mut self) -> Option<String> {
        let start = self.at;
        self.at += 1;
        loop {
            match self.peek()? {
                b'"' => break,
                b'\\' => self.at += 2,
                _ => self.at += 1,
            }
        }
        self.at += 1;
        serde_json::from_str(self.text.get(start..self.at)?).ok()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn values_know_where_they_stand() {
        let text = " {\"a\\\"b\" : [1, -2.5e3 ,true], \"ü\":{}, \"n\":null}\n";
        let json = Json::parse(text).unwrap();
        let members = json.members().unwrap();
        let spans: Vec<&str> = members.iter().map(|m| &text[m.value.span.clone()]).collect();
        assert_eq!(spans, ["[1, -2.5e3 ,true]", "{}", "null"]);
        assert_eq!(members[0].key, "a\"b");
        let Kind::Array(items) = &members[0].value.kind else { panic!("{members:?}") };
        assert_eq!(&text[items[1].span.clone()], "-2.5e3");
        let place = Position::of(text, members[2].key_span.start);
        assert_eq!(place, Position { line: 1, column: 39 });
    }

    #[test]
    fn what_is_no_json_is_told_with_its_place() {
        for (text, line, column) in
            [("", 1, 1), ("{\n  \"a\": 1,\n}", 3, 1), ("{} x", 1, 4), ("[1,]", 1, 4)]
        {
            let refusal = Json::parse(text).unwrap_err();
            assert_eq!(refusal.place.position, Position { line, column }, "{text:?}: {refusal}");
        }
        assert!(Json::parse(&"[".repeat(200)).is_err());
    }

    #[test]
    fn keys_are_found_as_go_finds_them() {
        let json = Json::parse(r#"{"Type":"a","type":"b","TYPE":null,"name":1,"Name":2}"#).unwrap();
        assert_eq!(json.folded("type").unwrap().value.as_str(), Some("b"));
        assert_eq!(json.exact("name").unwrap().key, "name");
        assert!(json.exact("TYPE").unwrap().value.kind == Kind::Null);
    }
}
