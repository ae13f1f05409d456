//! The history of one number for people who page through it: by date, by page or by cursor.

use super::error::{ApiError, Reason};
use super::messages::{Cards, MessageCard};
use super::service::{Api, number_only};
use super::token::{self, TokenKind};
use crate::domain::access::Caller;
use crate::domain::time::Timestamp;

/// Entries of a page when the caller does not say.
const PAGE_SIZE_DEFAULT: usize = 30;
/// Most entries of one page.
const PAGE_SIZE_MAX: usize = 100;
/// Messages that pages by number reach, and that are counted: counting goes through their keys, so it has an end.
pub const COUNTED_MAX: usize = 10_000;

/// What a caller wants to see. Texts as the caller gave them.
#[derive(Debug, Default)]
pub struct HistoryOrder<'a> {
    /// Only messages taken in from this moment on.
    pub start: Option<&'a str>,
    /// Only messages taken in before this moment.
    pub end: Option<&'a str>,
    /// Which page, from 1.
    pub page: Option<&'a str>,
    /// Entries of a page.
    pub page_size: Option<&'a str>,
    /// `next` of an earlier page, instead of `page`.
    pub cursor: Option<&'a str>,
}

/// A page of the history, newest first.
#[derive(Debug)]
pub struct HistoryPage {
    /// Its entries.
    pub entries: Vec<MessageCard>,
    /// Messages in the range; [`COUNTED_MAX`] when there are as many or more.
    pub total: usize,
    /// Which page it is.
    pub page: usize,
    /// Entries of a full page.
    pub page_size: usize,
    /// Where the next page begins, however far down; `None` on the last one.
    pub next: Option<String>,
    /// Whether there is nothing to see because the number keeps nothing.
    pub relays_only: bool,
}

impl Api {
    /// A page of the history of the key's number.
    ///
    /// # Errors
    /// `InvalidDateRange`, `ValidationError`, `InvalidPageToken`.
    pub async fn history(&self, caller: Caller, order: &HistoryOrder<'_>) -> Result<HistoryPage, ApiError> {
        number_only(caller)?;
        let record = self.number_meant(caller, "")?;
        let (start, end) = dates(order)?;
        let page_size = positive("pageSize", order.page_size, PAGE_SIZE_DEFAULT)?.min(PAGE_SIZE_MAX);
        let page = positive("page", order.page, 1)?;
        if page.saturating_mul(page_size) > COUNTED_MAX {
            return Err(ApiError::field("page", format!("reaches {COUNTED_MAX} messages; go on with cursor")));
        }
        let cursor = match order.cursor {
            None => None,
            Some(text) => match token::decode(TokenKind::History, text) {
                Some([of, seq]) if of == record.id.0 => Some(seq),
                _ => return Err(Reason::InvalidPageToken.into()),
            },
        };
        let mut found = HistoryPage { entries: Vec::new(), total: 0, page, page_size, next: None, relays_only: false };
        let Some(kept_from) = record.retention.shown_from(self.parts.clock.now()) else {
            return Ok(HistoryPage { relays_only: true, ..found });
        };
        let store = self.store_of(record.id)?;
        let Some(first) = store.first_message_since(start.max(kept_from)).await? else { return Ok(found) };
        let behind = match end {
            None => None,
            Some(end) => store.first_message_since(end).await?,
        };
        let last = behind.map_or(u64::MAX, |behind| behind.0.saturating_sub(1));
        found.total = store.count_messages(first.0..=last, COUNTED_MAX).await?;
        let (last, skip) = match cursor {
            Some(seq) => (last.min(seq.saturating_sub(1)), 0),
            None => (last, (page - 1) * page_size),
        };
        // One more than a page tells whether another one follows.
        let mut rows = store.messages_within(first.0..=last, (skip, page_size + 1)).await?;
        let more = rows.len() > page_size;
        rows.truncate(page_size);
        let lowest = rows.last().map(|row| row.seq.0);
        found.next = lowest.filter(|_| more).map(|seq| token::encode(TokenKind::History, [record.id.0, seq]));
        let mut cards = Cards::new(record.id, store);
        for row in rows {
            found.entries.push(cards.card(row).await?);
        }
        Ok(found)
    }
}

fn dates(order: &HistoryOrder<'_>) -> Result<(Timestamp, Option<Timestamp>), ApiError> {
    let read = |field, text: Option<&str>| match text.map(|text| (Timestamp::parse(text), text)) {
        None => Ok(None),
        Some((Some(at), _)) => Ok(Some(at)),
        Some((None, _)) => {
            let problem = "must be a moment such as 2026-01-31T12:00:00Z, or a date";
            Err(ApiError::of_field(Reason::InvalidDateRange, field, problem))
        }
    };
    let start = read("startDate", order.start)?;
    let end = read("endDate", order.end)?;
    if start.zip(end).is_some_and(|(start, end)| start > end) {
        return Err(ApiError::of_field(Reason::InvalidDateRange, "endDate", "lies before startDate"));
    }
    Ok((start.unwrap_or(Timestamp(0)), end))
}

fn positive(field: &'static str, text: Option<&str>, default: usize) -> Result<usize, ApiError> {
    let Some(text) = text else { return Ok(default) };
    let number = text.parse().ok().filter(|number| *number > 0);
    number.ok_or_else(|| ApiError::field(field, "must be a whole number from 1 on"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: &str, end: &str) -> Result<(Timestamp, Option<Timestamp>), Reason> {
        let order = HistoryOrder { start: Some(start), end: Some(end), ..HistoryOrder::default() };
        dates(&order).map_err(|error| error.reason)
    }

    #[test]
    fn a_range_ends_after_it_begins() {
        assert_eq!(range("1970-01-01", "1970-01-02"), Ok((Timestamp(0), Some(Timestamp(86_400_000)))));
        assert_eq!(range("1970-01-02", "1970-01-02").unwrap().0, Timestamp(86_400_000));
        assert_eq!(range("1970-01-03", "1970-01-02"), Err(Reason::InvalidDateRange));
        assert_eq!(range("soon", "1970-01-02"), Err(Reason::InvalidDateRange));
        assert_eq!(dates(&HistoryOrder::default()).unwrap(), (Timestamp(0), None));
    }

    #[test]
    fn numbers_of_pages_are_positive() {
        assert_eq!(positive("page", None, 7), Ok(7));
        assert_eq!(positive("page", Some("3"), 7), Ok(3));
        for wrong in ["0", "-1", "x", "1.5", ""] {
            assert_eq!(positive("page", Some(wrong), 7).unwrap_err().reason, Reason::ValidationError, "{wrong}");
        }
    }
}
