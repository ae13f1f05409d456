//! Tenants: the operator's use cases.

use super::error::{ApiError, Reason};
use super::keys::new_key;
use super::service::{Api, display_name, operator_only, page_size};
use super::token::{self, TokenKind};
use crate::domain::access::Caller;
use crate::domain::id::TenantId;
use crate::store::meta::{KeySubject, TenantRecord};

/// Most entries of one page.
const PAGE_MAX: usize = 1000;

/// A page of a list, and the token of the next.
#[derive(Debug)]
pub struct Page<T> {
    /// The entries.
    pub entries: Vec<T>,
    /// Empty on the last page.
    pub next: String,
}

impl Api {
    /// Makes a tenant; returns it with the text of its first key.
    ///
    /// # Errors
    /// See the contract.
    pub async fn create_tenant(&self, caller: Caller, name: &str) -> Result<(TenantRecord, String), ApiError> {
        operator_only(caller)?;
        let name = display_name(name)?;
        let now = self.parts.clock.now();
        let record = TenantRecord { id: TenantId(self.parts.random.word()), name, created_at: now };
        let (key, key_record) = new_key(KeySubject::Tenant(record.id), &self.parts.random, now);
        let meta = self.parts.store.meta().clone();
        let made = record.clone();
        self.to_the_end(async move {
            meta.put_tenant(record).await?;
            meta.put_key(key_record).await?;
            Ok(())
        })
        .await?;
        tracing::info!(tenant = %made.id, "tenant created");
        Ok((made, key.text))
    }

    /// One tenant: the operator's choice, or the caller's own.
    ///
    /// # Errors
    /// See the contract.
    pub fn tenant(&self, caller: Caller, id: &str) -> Result<TenantRecord, ApiError> {
        let id = match (caller, id) {
            (Caller::Number { .. }, _) => return Err(Reason::NumberScopeNotAllowed.into()),
            (Caller::Tenant(own), "") => own,
            (Caller::Operator, "") => return Err(ApiError::field("id", "is required with the operator's key")),
            (_, id) => id.parse().map_err(|_| Reason::TenantNotFound)?,
        };
        let visible = match caller {
            Caller::Tenant(own) => own == id,
            Caller::Operator | Caller::Number { .. } => true,
        };
        let record = self.parts.store.meta().tenant(id).filter(|_| visible);
        Ok(record.ok_or(Reason::TenantNotFound)?)
    }

    /// Tenants, oldest first.
    ///
    /// # Errors
    /// See the contract.
    pub fn tenants(&self, caller: Caller, size: i32, token: &str) -> Result<Page<TenantRecord>, ApiError> {
        operator_only(caller)?;
        let all = self.parts.store.meta().tenants();
        let position = |tenant: &TenantRecord| [tenant.created_at.0, tenant.id.0];
        page_of(all, TokenKind::Tenants, position, page_size(size, PAGE_MAX)?, token)
    }
}

/// The page after `token` of a list that is sorted by `position`.
pub(super) fn page_of<T>(
    all: Vec<T>,
    kind: TokenKind,
    position: impl Fn(&T) -> [u64; 2],
    size: usize,
    token: &str,
) -> Result<Page<T>, ApiError> {
    let after = match token {
        "" => None,
        token => Some(token::decode(kind, token).ok_or(Reason::InvalidPageToken)?),
    };
    let mut rest = all.into_iter().filter(|entry| after.is_none_or(|after| position(entry) > after));
    let entries: Vec<T> = rest.by_ref().take(size).collect();
    let next = match (rest.next(), entries.last()) {
        (Some(_), Some(last)) => token::encode(kind, position(last)),
        _ => String::new(),
    };
    Ok(Page { entries, next })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paging_gives_every_entry_once() {
        let all: Vec<u64> = (0..10).collect();
        let (mut seen, mut token) = (Vec::new(), String::new());
        loop {
            let page = page_of(all.clone(), TokenKind::Numbers, |entry| [0, *entry], 3, &token).unwrap();
            assert!(page.entries.len() <= 3);
            seen.extend(page.entries);
            token = page.next;
            if token.is_empty() {
                break;
            }
        }
        assert_eq!(seen, all);
        let wrong = page_of(all, TokenKind::Numbers, |entry| [0, *entry], 3, "junk");
        assert_eq!(wrong.map(drop).unwrap_err().reason, Reason::InvalidPageToken);
    }
}
