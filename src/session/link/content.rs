//! What a WhatsApp message says, without its wrappers, and the digest that tells a repeat from an id used twice.

use sha2::{Digest, Sha256};
use whatsapp_rust::waproto::codec::message_to_vec;
use whatsapp_rust::waproto::whatsapp as wa;
use whatsapp_rust::waproto::whatsapp::message::protocol_message::Type as ProtocolType;

use crate::domain::message::Content;

/// Wrappers around wrappers that are followed; WhatsApp itself nests two.
const WRAPPERS_MAX: usize = 8;

/// The inner message of a wrapper, if this is one.
fn unwrap_once(message: &wa::Message) -> Option<&wa::Message> {
    macro_rules! wrapped {
        ($($field:ident),+ $(,)?) => {
            $(
                if let Some(inner) = message.$field.as_option().and_then(|wrapper| wrapper.message.as_option()) {
                    return Some(inner);
                }
            )+
        };
    }
    wrapped!(
        device_sent_message,
        ephemeral_message,
        view_once_message,
        view_once_message_v2,
        view_once_message_v2_extension,
        document_with_caption_message,
        group_mentioned_message,
        associated_child_message,
        bot_invoke_message,
        lottie_sticker_message,
    );
    None
}

/// The message a person wrote, without the wrappers around it.
pub(super) fn unwrap(message: &wa::Message) -> &wa::Message {
    let mut inner = message;
    for _ in 0..WRAPPERS_MAX {
        match unwrap_once(inner) {
            Some(next) => inner = next,
            None => break,
        }
    }
    inner
}

/// WhatsApp's name of the first field that is set and that a person would see.
fn kind(message: &wa::Message) -> Option<&'static str> {
    macro_rules! first_set {
        ($($field:ident => $name:literal),+ $(,)?) => {
            $(
                if message.$field.is_set() {
                    return Some($name);
                }
            )+
        };
    }
    first_set!(
        image_message => "imageMessage",
        video_message => "videoMessage",
        ptv_message => "ptvMessage",
        audio_message => "audioMessage",
        document_message => "documentMessage",
        sticker_message => "stickerMessage",
        sticker_pack_message => "stickerPackMessage",
        album_message => "albumMessage",
        contact_message => "contactMessage",
        contacts_array_message => "contactsArrayMessage",
        location_message => "locationMessage",
        live_location_message => "liveLocationMessage",
        reaction_message => "reactionMessage",
        enc_reaction_message => "encReactionMessage",
        poll_creation_message => "pollCreationMessage",
        poll_creation_message_v2 => "pollCreationMessageV2",
        poll_creation_message_v3 => "pollCreationMessageV3",
        poll_creation_message_v5 => "pollCreationMessageV5",
        poll_update_message => "pollUpdateMessage",
        event_message => "eventMessage",
        enc_event_response_message => "encEventResponseMessage",
        buttons_message => "buttonsMessage",
        buttons_response_message => "buttonsResponseMessage",
        list_message => "listMessage",
        list_response_message => "listResponseMessage",
        template_message => "templateMessage",
        template_button_reply_message => "templateButtonReplyMessage",
        interactive_message => "interactiveMessage",
        interactive_response_message => "interactiveResponseMessage",
        product_message => "productMessage",
        order_message => "orderMessage",
        group_invite_message => "groupInviteMessage",
        edited_message => "editedMessage",
        secret_encrypted_message => "secretEncryptedMessage",
        pin_in_chat_message => "pinInChatMessage",
        keep_in_chat_message => "keepInChatMessage",
        comment_message => "commentMessage",
        call => "call",
        call_log_messsage => "callLogMesssage",
        send_payment_message => "sendPaymentMessage",
        request_payment_message => "requestPaymentMessage",
        highly_structured_message => "highlyStructuredMessage",
    );
    None
}

/// What the message says. `None`: nothing a person would see (key shares, history notices, sender keys).
pub(super) fn content(message: &wa::Message) -> Option<Content> {
    let message = unwrap(message);
    if let Some(text) = &message.conversation
        && !text.is_empty()
    {
        return Some(Content::Text(text.clone()));
    }
    let extended = message.extended_text_message.as_option();
    if let Some(text) = extended.and_then(|extended| extended.text.as_ref()) {
        return Some(Content::Text(text.clone()));
    }
    if let Some(name) = kind(message) {
        return Some(Content::Other(name.to_owned()));
    }
    if let Some(protocol) = message.protocol_message.as_option() {
        let visible = matches!(protocol.r#type, Some(ProtocolType::REVOKE | ProtocolType::MESSAGE_EDIT));
        return visible.then(|| Content::Other("protocolMessage".to_owned()));
    }
    let mut rest = message.clone();
    strip(&mut rest);
    if message_to_vec(&rest).is_empty() {
        return None;
    }
    Some(Content::Other("unknown".to_owned()))
}

/// Takes out what differs between two deliveries of one message.
fn strip(message: &mut wa::Message) {
    message.message_context_info = Default::default();
    message.sender_key_distribution_message = Default::default();
    message.fast_ratchet_key_sender_key_distribution_message = Default::default();
}

/// The first 16 bytes of a SHA-256 over what the message says.
pub(super) fn digest(message: &wa::Message, content: &Content) -> [u8; 16] {
    let mut hasher = Sha256::new();
    hasher.update(content.kind().as_bytes());
    hasher.update([0]);
    match content {
        Content::Text(text) => hasher.update(text.as_bytes()),
        Content::Other(_) => {
            let mut message = unwrap(message).clone();
            strip(&mut message);
            hasher.update(message_to_vec(&message));
        }
        Content::Undecryptable | Content::NotKept => {}
    }
    let mut short = [0; 16];
    short.copy_from_slice(&hasher.finalize()[..16]);
    short
}

#[cfg(test)]
mod tests {
    use super::*;
    use whatsapp_rust::buffa::MessageField;

    fn text(text: &str) -> wa::Message {
        wa::Message { conversation: Some(text.to_owned()), ..Default::default() }
    }

    fn ephemeral(inner: wa::Message) -> wa::Message {
        wa::Message {
            ephemeral_message: MessageField::some(wa::message::FutureProofMessage {
                message: MessageField::some(inner),
            }),
            ..Default::default()
        }
    }

    fn protocol(kind: ProtocolType) -> wa::Message {
        wa::Message {
            protocol_message: MessageField::some(wa::message::ProtocolMessage {
                r#type: Some(kind),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn text_is_found_under_its_wrappers() {
        let sent = wa::Message {
            device_sent_message: MessageField::some(wa::message::DeviceSentMessage {
                message: MessageField::some(ephemeral(text("hello"))),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(content(&sent), Some(Content::Text("hello".to_owned())));
        let extended = wa::Message {
            extended_text_message: MessageField::some(wa::message::ExtendedTextMessage {
                text: Some("a link".to_owned()),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(content(&extended), Some(Content::Text("a link".to_owned())));
    }

    #[test]
    fn other_kinds_are_named_as_whatsapp_names_them() {
        let image = wa::Message {
            image_message: MessageField::some(wa::message::ImageMessage::default()),
            ..Default::default()
        };
        assert_eq!(content(&ephemeral(image)), Some(Content::Other("imageMessage".to_owned())));
        assert_eq!(content(&protocol(ProtocolType::REVOKE)), Some(Content::Other("protocolMessage".to_owned())));
    }

    #[test]
    fn what_nobody_sees_is_no_message() {
        assert_eq!(content(&wa::Message::default()), None);
        for kind in [
            ProtocolType::APP_STATE_SYNC_KEY_SHARE,
            ProtocolType::HISTORY_SYNC_NOTIFICATION,
            ProtocolType::EPHEMERAL_SETTING,
        ] {
            assert_eq!(content(&protocol(kind)), None);
        }
        let keys_only = wa::Message {
            sender_key_distribution_message: MessageField::some(wa::message::SenderKeyDistributionMessage {
                group_id: Some("g@g.us".to_owned()),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(content(&keys_only), None);
    }

    #[test]
    fn the_digest_ignores_envelopes_and_nothing_else() {
        let of = |message: &wa::Message| digest(message, &content(message).unwrap());
        let mut dressed = ephemeral(text("hello"));
        dressed.message_context_info =
            MessageField::some(wa::MessageContextInfo { message_secret: Some(vec![1; 32]), ..Default::default() });
        assert_eq!(of(&text("hello")), of(&dressed));
        assert_ne!(of(&text("hello")), of(&text("hello ")));
        let image = |url: &str| wa::Message {
            image_message: MessageField::some(wa::message::ImageMessage {
                url: Some(url.to_owned()),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_ne!(of(&image("a")), of(&image("b")));
        assert_eq!(of(&image("a")), of(&ephemeral(image("a"))));
    }
}
