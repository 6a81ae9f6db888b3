//! Tables for terminals of any width. Pure.

/// A column, and how dispensable it is.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    pub title: &'static str,
    /// Numbers stand at the right.
    pub right: bool,
    /// Where there is not room for all, the columns with the highest number go first. 0 stays.
    pub dispensable: u8,
    /// How far its cells may be cut where there is still not room enough, if at all.
    pub shortest: Option<usize>,
}

/// Renders rows, all of them with a cell for each column, in at most `width` columns of a terminal.
/// `None`: not even the indispensable ones fit. Without a width nothing is left out.
#[must_use]
pub fn table(columns: &[Column], rows: &[Vec<String>], width: Option<usize>) -> Option<String> {
    let mut wide: Vec<usize> = columns
        .iter()
        .enumerate()
        .map(|(index, column)| {
            let cells = rows.iter().filter_map(|row| row.get(index)).map(|cell| length(cell));
            cells.max().unwrap_or_default().max(length(column.title))
        })
        .collect();
    let mut limit = u8::MAX;
    let (shown, excess) = loop {
        let shown: Vec<usize> = (0..columns.len())
            .filter(|index| columns.get(*index).is_some_and(|it| it.dispensable <= limit))
            .collect();
        let needed: usize = shown.iter().filter_map(|index| wide.get(*index)).sum::<usize>()
            + 2 * shown.len().saturating_sub(1);
        let excess = needed.saturating_sub(width.unwrap_or(usize::MAX));
        if excess == 0 || limit == 0 {
            break (shown, excess);
        }
        let most = columns.iter().map(|it| it.dispensable).filter(|rank| *rank <= limit).max();
        limit = most.unwrap_or_default().saturating_sub(1);
    };
    cut(columns, &mut wide, excess)?;
    let line = |cells: &dyn Fn(usize) -> String| {
        let mut text = String::new();
        for index in &shown {
            let cell = shortened(&cells(*index), wide.get(*index).copied().unwrap_or_default());
            let gap =
                " ".repeat(wide.get(*index).map_or(0, |wide| wide.saturating_sub(length(&cell))));
            match columns.get(*index).is_some_and(|column| column.right) {
                true => text += &format!("{gap}{cell}  "),
                false => text += &format!("{cell}{gap}  "),
            }
        }
        text.trim_end().to_owned() + "\n"
    };
    let titles = |index: usize| columns.get(index).map_or("", |column| column.title).to_owned();
    let mut text = line(&titles);
    for row in rows {
        text += &line(&|index| row.get(index).cloned().unwrap_or_default());
    }
    Some(text)
}

/// Takes what is too much from the columns that can be cut; `None` if that is not enough.
fn cut(columns: &[Column], wide: &mut [usize], mut excess: usize) -> Option<()> {
    for (column, wide) in columns.iter().zip(wide).filter(|(column, _)| column.dispensable == 0) {
        let room = column.shortest.map_or(0, |shortest| wide.saturating_sub(shortest));
        let less = room.min(excess);
        *wide -= less;
        excess -= less;
    }
    (excess == 0).then_some(())
}

/// Cut in its middle: the ends of pods' names tell replicas apart.
fn shortened(text: &str, width: usize) -> String {
    let count = length(text);
    if count <= width {
        return text.to_owned();
    }
    let kept = width.saturating_sub(1);
    let (head, tail) = (kept / 2, kept - kept / 2);
    text.chars().take(head).chain(['…']).chain(text.chars().skip(count - tail)).collect()
}

/// Lines of words that stay together, the first line at the margin and the others indented. A word that
/// is wider than the terminal is cut.
#[must_use]
pub fn paragraph(words: &[String], width: usize) -> String {
    const INDENT: &str = "  ";
    let room = width.saturating_sub(INDENT.len()).max(1);
    let mut lines: Vec<String> = Vec::new();
    for word in words.iter().filter(|word| !word.is_empty()) {
        let word = shortened(word, room);
        match lines.last_mut() {
            Some(line) if length(line) + 1 + length(&word) <= width => {
                line.push(' ');
                line.push_str(&word);
            }
            Some(_) => lines.push(format!("{INDENT}{word}")),
            None => lines.push(word),
        }
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// Time since something, in the largest unit that says enough.
#[must_use]
pub fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

/// A number of bytes with one digit behind the point, in units of 1024.
#[must_use]
pub fn bytes(number: u64) -> String {
    let mut unit = 1_u64;
    for name in ["", "K", "M", "G", "T"] {
        if name == "T" || number < unit.saturating_mul(1024) {
            return match name {
                "" => number.to_string(),
                // Integers alone: nothing is rounded up to 1024.0K.
                _ => format!("{}.{}{name}", number / unit, number % unit * 10 / unit),
            };
        }
        unit *= 1024;
    }
    number.to_string()
}

fn length(text: &str) -> usize {
    text.chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 3] = [
        Column { title: "NAME", right: false, dispensable: 0, shortest: Some(4) },
        Column { title: "MORE", right: false, dispensable: 2, shortest: None },
        Column { title: "N", right: true, dispensable: 1, shortest: None },
    ];

    #[test]
    fn columns_go_by_rank_until_the_rest_fits() {
        let rows = [
            ["a", "words", "12"].map(String::from).to_vec(),
            ["bcdef", "", "3"].map(String::from).to_vec(),
        ];
        let show = |width| table(&COLUMNS, &rows, width).unwrap_or_else(|| "too narrow".into());
        assert_eq!(show(None), "NAME   MORE    N\na      words  12\nbcdef          3\n");
        assert_eq!(show(Some(16)), show(None));
        assert_eq!(show(Some(15)), "NAME    N\na      12\nbcdef   3\n");
        assert_eq!(show(Some(8)), "NAME\na\nbcdef\n");
        assert_eq!(show(Some(4)), "NAME\na\nb…ef\n");
        assert_eq!(show(Some(3)), "too narrow");
    }

    #[test]
    fn paragraphs_break_between_words() {
        let words = ["one two", "three", "", "fourteen"].map(String::from);
        assert_eq!(paragraph(&words, 80), "one two three fourteen\n");
        assert_eq!(paragraph(&words, 13), "one two three\n  fourteen\n");
        assert_eq!(paragraph(&words, 9), "one two\n  three\n  fou…een\n");
    }

    #[test]
    fn numbers_are_short() {
        let ages = [0, 119, 120, 7199, 7200, 172_799, 172_800].map(age);
        assert_eq!(ages, ["0s", "119s", "2m", "119m", "2h", "47h", "2d"]);
        let sizes = [0, 1023, 1024, 1536, 1_048_575, 1 << 20, 1 << 40, u64::MAX].map(bytes);
        assert_eq!(sizes, ["0", "1023", "1.0K", "1.5K", "1023.9K", "1.0M", "1.0T", "16777215.9T"]);
    }
}
