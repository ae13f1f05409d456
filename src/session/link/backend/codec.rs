//! How the library's own types lie in a row: MessagePack with field names, so that fields may come and go with
//! the library, and byte strings as bytes. In JSON a key is three to four times its length, and a login writes
//! its device row several times.

use rmp_serde::Serializer;
use rmp_serde::config::BytesMode;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// First bytes of the rows earlier builds wrote: a JSON object or list. MessagePack starts neither a map nor a
/// list below 0x80.
const JSON: [u8; 2] = *b"{[";

/// A row of a map or a list.
///
/// # Errors
/// When the type has no such form.
pub(super) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, rmp_serde::encode::Error> {
    let mut row = Vec::new();
    value.serialize(&mut Serializer::new(&mut row).with_struct_map().with_bytes(BytesMode::ForceAll))?;
    Ok(row)
}

/// Reads a row of this build or of an earlier one; `None` when it is neither. Why is not said: the parsers quote
/// the value, which may be a name or a key.
pub(super) fn decode<T: DeserializeOwned>(row: &[u8]) -> Option<T> {
    if row.first().is_some_and(|first| JSON.contains(first)) {
        return serde_json::from_slice(row).ok();
    }
    rmp_serde::from_slice(row).ok()
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;
    use std::sync::Arc;

    use whatsapp_rust::wacore::appstate::hash::HashState;
    use whatsapp_rust::wacore::store::Device;
    use whatsapp_rust::wacore::store::device::{CachedNoiseCert, CachedServerCertChain};
    use whatsapp_rust::wacore::store::traits::{
        AppStateSyncKey, DeviceInfo, DeviceListRecord, LidPnMappingEntry, TcTokenEntry,
    };
    use whatsapp_rust::waproto::whatsapp::ADVSignedDeviceIdentity;

    use super::*;

    /// Every byte value, so that no width of an integer goes untried.
    fn bytes<const N: usize>() -> [u8; N] {
        std::array::from_fn(|at| u8::try_from((at * 37 + 251) % 256).unwrap())
    }

    fn used_device() -> Device {
        let mut device = Device::new();
        device.pn = Some("5511999990001:3@s.whatsapp.net".parse().unwrap());
        device.lid = Some("100000000000001:3@lid".parse().unwrap());
        device.account = Some(Arc::new(ADVSignedDeviceIdentity {
            details: Some(bytes::<40>().to_vec()),
            account_signature_key: Some(bytes::<32>().to_vec()),
            account_signature: Some(bytes::<64>().to_vec()),
            device_signature: Some(bytes::<64>().to_vec()),
        }));
        device.push_name = "Loja ☀".to_owned();
        device.edge_routing_info = Some(bytes::<16>().to_vec());
        device.props_hash = Some("hash".to_owned());
        device.next_pre_key_id = 61;
        device.nct_salt = Some(bytes::<32>().to_vec());
        let cert = CachedNoiseCert { key: bytes::<32>(), not_before: -1, not_after: i64::MAX };
        device.server_cert_chain = Some(CachedServerCertChain { intermediate: cert.clone(), leaf: cert });
        device.login_counter = -7;
        device
    }

    /// Both forms of a row read back to the same, and the smaller one is written.
    fn survives<T: Serialize + DeserializeOwned>(value: &T) {
        let json = serde_json::to_vec(value).unwrap();
        let row = encode(value).unwrap();
        assert!(row[0] >= 0x80, "taken for JSON");
        assert!(row.len() < json.len());
        for stored in [&row, &json] {
            let read: T = decode(stored).unwrap();
            assert_eq!(serde_json::to_vec(&read).unwrap(), json);
        }
        assert!(decode::<T>(&row[..row.len() - 1]).is_none(), "a row cut short");
    }

    #[test]
    fn what_the_library_keeps_in_rows_reads_back() {
        survives(&Device::new());
        survives(&used_device());
        survives(&HashState { version: 1 << 40, hash: bytes::<128>(), ..Default::default() });
        survives(&AppStateSyncKey { key_data: bytes::<32>().to_vec(), fingerprint: Vec::new(), timestamp: -1 });
        survives(&TcTokenEntry { token: Vec::new(), token_timestamp: 1, sender_timestamp: Some(i64::MIN) });
        survives(&DeviceListRecord {
            user: "551199".to_owned(),
            devices: vec![DeviceInfo::new(0, None), DeviceInfo::new(3, Some(2))],
            timestamp: 5,
            phash: None,
            raw_id: Some(1),
        });
        survives(&LidPnMappingEntry {
            lid: "7".to_owned(),
            phone_number: "551100001".to_owned(),
            created_at: 1,
            updated_at: 1,
            learning_source: "usync".to_owned(),
        });
    }

    #[test]
    fn a_row_of_an_older_library_lacks_fields_and_reads() {
        let device = used_device();
        let mut fields = serde_json::to_value(&device).unwrap();
        for newer in ["login_counter", "lid_migrated", "server_cert_chain"] {
            assert!(fields.as_object_mut().unwrap().remove(newer).is_some());
        }
        let read: Device = decode(&encode(&fields).unwrap()).unwrap();
        assert_eq!((read.login_counter, read.next_pre_key_id), (0, device.next_pre_key_id));
    }

    #[test]
    fn a_login_writes_half_of_what_json_took() {
        let device = used_device();
        let (row, json) = (encode(&device).unwrap().len(), serde_json::to_vec(&device).unwrap().len());
        assert!(row * 2 < json, "{row} of {json} bytes");
    }

    fn refused<T: DeserializeOwned + Debug>(row: &[u8]) {
        assert!(decode::<T>(row).is_none());
    }

    #[test]
    fn what_is_no_row_is_refused() {
        for row in [&b""[..], b"{", b"{}", b"[", b"x", b"\xc1", b"\xdf\xff\xff\xff\xff"] {
            refused::<DeviceListRecord>(row);
        }
    }
}
