//! The person behind a number: a phone that decrypts what reaches it, shows each message once, ticks, reads, answers,
//! asks again for what it cannot open and repeats what others could not.
//!
//! Pure over its own state: it returns errands, the world runs them.

use crate::sandbox::address::{DeviceAddress, Namespace, PhoneNumber, resolve};
use crate::sandbox::appstate::AppStateKey;
use crate::sandbox::error::{Result, SandboxError};
use crate::sandbox::receipt::{Receipt, Tick};
use crate::sandbox::signal_store::{Bundle, Sealed, SignalStore, StoredSignal, is_repeat, last_of_message};
use crate::sandbox::stanza::{self, attr, bytes, fresh_id, jid, tag};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, VecDeque};
use whatsapp_rust::wacore::messages::{MessageUtils, decode_plaintext, unwrap_device_sent, wrap_device_sent};
use whatsapp_rust::wacore_binary::{Jid, Node, NodeContent};
use whatsapp_rust::waproto::whatsapp as wa;

/// Messages a phone shows; the oldest scroll away beyond it.
const SHOWN_LIMIT: usize = 10_000;
/// Own messages a phone can repeat.
const SENT_LIMIT: usize = 1_024;
/// Messages a phone is asking for again at the same time.
const ASKED_LIMIT: usize = 1_024;
/// A phone asks for a message this often.
const ASK_AT_MOST: u8 = 5;
const PADDING: u8 = 2;

/// Where a shown message came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Somebody wrote to this person.
    In,
    /// This person wrote, on the phone or on a linked device.
    Out,
}

/// How far a message has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Outgoing: on its way. Incoming: shown, not read.
    Sent,
    /// Shown on a device of the other person.
    Delivered,
    /// Seen by the other person, or by this one when incoming.
    Read,
    /// Listened to or watched.
    Played,
}

/// One line of a chat as the person sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Shown {
    /// Who wrote.
    pub from: PhoneNumber,
    /// The message's id.
    pub id: String,
    /// Its text, or a word in brackets for another kind.
    pub text: String,
    /// How often the message has reached this phone.
    pub times_received: u32,
    /// How far it has come.
    pub status: Status,
    /// The other person of the chat.
    pub chat: PhoneNumber,
    /// Who wrote, seen from here.
    pub direction: Direction,
    /// The device that wrote.
    pub device: u16,
    /// The spelling of addresses the writer used.
    pub addressing: Namespace,
    /// When it was shown, in seconds.
    pub at: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct ShownKey {
    from: PhoneNumber,
    chat: PhoneNumber,
    id: String,
}

/// A message a phone has sent and may have to repeat.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Sent {
    id: String,
    to: PhoneNumber,
    text: String,
    addressing: Namespace,
}

/// A stanza for one device, complete but for the recipient's own view of it.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// The device that wrote.
    pub from: DeviceAddress,
    /// The device that gets it.
    pub to: DeviceAddress,
    /// What it gets.
    pub node: Node,
}

impl Delivery {
    /// Makes a sealed message one that nobody can open: its authentication code is wrong, everything else is right.
    pub fn spoil(&mut self) {
        let Some(NodeContent::Nodes(parts)) = &mut self.node.content else { return };
        for sealed in parts.iter_mut().filter(|part| part.tag == "enc") {
            let mut content = bytes(sealed).unwrap_or_default().into_owned();
            if let Some(last) = last_of_message(&content).and_then(|last| content.get_mut(last)) {
                *last ^= 1;
                sealed.content = Some(NodeContent::Bytes(content));
            }
        }
    }
}

/// Something a phone wants done that needs more than its own state.
#[derive(Debug)]
pub enum Errand {
    /// Carry this.
    Deliver(Delivery),
    /// Tell the devices of a person about a message.
    Tick(Tick),
    /// Send a message once more to a device that could not open it, with the keys it offered.
    Repeat {
        /// The device.
        to: DeviceAddress,
        /// The message.
        id: String,
        /// How often the device has asked.
        count: u32,
        /// The device's keys, if it sent some.
        keys: Option<Bundle>,
    },
    /// Give a linked device the keys of the app state.
    ShareKeys(DeviceAddress),
}

/// A person and their phone.
pub struct Person {
    /// What others see as the name.
    pub name: String,
    /// The phone's Signal state.
    pub signal: SignalStore,
    own: PhoneNumber,
    app_state: AppStateKey,
    shown: VecDeque<Shown>,
    first_shown: u64,
    positions: HashMap<ShownKey, u64>,
    sent: VecDeque<Sent>,
    asked: HashMap<(DeviceAddress, String), u8>,
}

/// The stored form of a [`Person`].
#[derive(Serialize, Deserialize)]
pub struct StoredPerson {
    name: String,
    signal: StoredSignal,
    app_state: AppStateKey,
    shown: Vec<Shown>,
    sent: VecDeque<Sent>,
}

impl Person {
    /// A person with a new phone.
    pub fn new(own: PhoneNumber) -> Result<Self> {
        let tail: String = own.as_str().chars().rev().take(4).collect::<Vec<_>>().into_iter().rev().collect();
        let signal = SignalStore::generate()?;
        Ok(Self::assemble(own, format!("Sandbox {tail}"), signal, AppStateKey::generate()))
    }

    fn assemble(own: PhoneNumber, name: String, signal: SignalStore, app_state: AppStateKey) -> Self {
        Self {
            name,
            signal,
            own,
            app_state,
            shown: VecDeque::new(),
            first_shown: 0,
            positions: HashMap::new(),
            sent: VecDeque::new(),
            asked: HashMap::new(),
        }
    }

    /// Reads a stored person.
    pub fn restore(own: PhoneNumber, stored: StoredPerson) -> Result<Self> {
        let signal = SignalStore::restore(stored.signal)?;
        let mut person = Self::assemble(own, stored.name, signal, stored.app_state);
        person.sent = stored.sent;
        for line in stored.shown {
            person.show(line);
        }
        Ok(person)
    }

    /// The form to store.
    pub fn stored(&self) -> Result<StoredPerson> {
        Ok(StoredPerson {
            name: self.name.clone(),
            signal: self.signal.stored()?,
            app_state: self.app_state.clone(),
            shown: self.shown.iter().cloned().collect(),
            sent: self.sent.clone(),
        })
    }

    /// What the phone shows, oldest first.
    pub fn messages(&self) -> impl Iterator<Item = &Shown> {
        self.shown.iter()
    }

    fn address(&self) -> DeviceAddress {
        DeviceAddress::new(self.own.clone(), 0)
    }

    fn show(&mut self, line: Shown) {
        let key = ShownKey { from: line.from.clone(), chat: line.chat.clone(), id: line.id.clone() };
        self.positions.insert(key, self.first_shown + self.shown.len() as u64);
        self.shown.push_back(line);
        while self.shown.len() > SHOWN_LIMIT {
            self.first_shown += 1;
            if let Some(gone) = self.shown.pop_front() {
                self.positions.remove(&ShownKey { from: gone.from, chat: gone.chat, id: gone.id });
            }
        }
    }

    fn line(&mut self, key: &ShownKey) -> Option<&mut Shown> {
        let index = self.positions.get(key)?.checked_sub(self.first_shown)?;
        self.shown.get_mut(usize::try_from(index).ok()?)
    }

    /// Takes in a stanza addressed to device 0.
    pub fn receive(&mut self, from: &DeviceAddress, node: &Node) -> Vec<Errand> {
        match node.tag.as_ref() {
            "message" => self.receive_message(from, node),
            "receipt" => self.receive_receipt(from, node),
            _ => Vec::new(),
        }
    }

    fn receive_message(&mut self, from: &DeviceAddress, node: &Node) -> Vec<Errand> {
        let (Some(arrival), Some(sealed)) = (Arrival::read(from, node), node.get_optional_child("enc")) else {
            return Vec::new();
        };
        let kind = attr(sealed, "type").unwrap_or_default();
        let opened = self.signal.open(from, &kind, &bytes(sealed).unwrap_or_default());
        match opened {
            Ok(plaintext) => {
                self.asked.remove(&(from.clone(), arrival.key.id.clone()));
                let mut errands = vec![self.tick(&arrival)];
                errands.extend(self.take_in(&arrival, &plaintext));
                errands
            }
            Err(error) if is_repeat(&error) || self.positions.contains_key(&arrival.key) => {
                if let Some(line) = self.line(&arrival.key) {
                    line.times_received += 1;
                }
                vec![self.tick(&arrival)]
            }
            Err(_) => self.ask_again(&arrival).into_iter().map(Errand::Deliver).collect(),
        }
    }

    fn tick(&self, arrival: &Arrival) -> Errand {
        let kind = match (arrival.peer, &arrival.recipient) {
            (true, _) => Some("peer_msg"),
            (false, Some(_)) => Some("sender"),
            (false, None) => None,
        };
        Errand::Tick(Tick {
            from: self.address(),
            to: arrival.from.clone(),
            addressing: arrival.addressing,
            receipt: Receipt {
                ids: vec![arrival.key.id.clone()],
                kind: kind.map(str::to_owned),
                recipient: arrival.recipient.clone(),
                at: stanza::now(),
            },
        })
    }

    fn take_in(&mut self, arrival: &Arrival, plaintext: &[u8]) -> Option<Errand> {
        let message = unwrap_device_sent(decode_plaintext(plaintext, PADDING).ok()?);
        if let Some(protocol) = message.protocol_message.as_option() {
            let wants_keys = protocol.app_state_sync_key_request.as_option().is_some();
            return (wants_keys && arrival.from.phone == self.own).then(|| Errand::ShareKeys(arrival.from.clone()));
        }
        if let Some(line) = self.line(&arrival.key) {
            line.times_received += 1;
            return None;
        }
        let direction = if arrival.from.phone == self.own { Direction::Out } else { Direction::In };
        self.show(Shown {
            from: arrival.from.phone.clone(),
            id: arrival.key.id.clone(),
            text: in_words(&message),
            times_received: 1,
            status: Status::Sent,
            chat: arrival.key.chat.clone(),
            direction,
            device: arrival.from.device,
            addressing: arrival.addressing,
            at: stanza::now(),
        });
        None
    }

    fn ask_again(&mut self, arrival: &Arrival) -> Option<Delivery> {
        if self.asked.len() >= ASKED_LIMIT {
            self.asked.clear();
        }
        let count = self.asked.entry((arrival.from.clone(), arrival.key.id.clone())).or_default();
        if *count >= ASK_AT_MOST {
            return None;
        }
        *count += 1;
        let count = *count;
        let keys = self.signal.bundle().ok()?;
        let retry =
            tag("retry").attr("v", "1").attr("id", &arrival.key.id).attr("t", stanza::now()).attr("count", count);
        let mut receipt = tag("receipt")
            .attr("from", arrival.addressing.device(&self.address()))
            .attr("id", &arrival.key.id)
            .attr("type", "retry")
            .attr("t", stanza::now());
        if let Some(recipient) = &arrival.recipient {
            receipt = receipt.attr("recipient", recipient);
        }
        let registration = tag("registration").bytes(keys.registration_id.to_be_bytes()).build();
        let node = receipt.children([retry.build(), registration, keys.retry_node()]).build();
        Some(Delivery { from: self.address(), to: arrival.from.clone(), node })
    }

    fn receive_receipt(&mut self, from: &DeviceAddress, node: &Node) -> Vec<Errand> {
        let kind = attr(node, "type").unwrap_or_default();
        if kind == "retry" {
            return repeat_request(from, node).into_iter().collect();
        }
        let status = match kind.as_ref() {
            "" | "inactive" => Status::Delivered,
            "read" => Status::Read,
            "played" => Status::Played,
            _ => return Vec::new(),
        };
        for id in Receipt::ids_of(node) {
            let key = ShownKey { from: self.own.clone(), chat: from.phone.clone(), id };
            if let Some(line) = self.line(&key) {
                line.status = line.status.max(status);
            }
        }
        Vec::new()
    }

    /// Marks everything `peer` wrote as read and says so; one tick per device and spelling that wrote.
    pub fn read_all(&mut self, peer: &PhoneNumber) -> Vec<Tick> {
        let from = self.address();
        let mut ticks: Vec<Tick> = Vec::new();
        for line in self.shown.iter_mut() {
            if line.from != *peer || line.direction != Direction::In || line.status >= Status::Read {
                continue;
            }
            line.status = Status::Read;
            let writer = DeviceAddress::new(peer.clone(), line.device);
            let same = |tick: &&mut Tick| tick.to == writer && tick.addressing == line.addressing;
            if let Some(tick) = ticks.iter_mut().find(same) {
                tick.receipt.ids.push(line.id.clone());
                continue;
            }
            let (kind, at) = (Some("read".to_owned()), stanza::now());
            let receipt = Receipt { ids: vec![line.id.clone()], kind, recipient: None, at };
            ticks.push(Tick { from: from.clone(), to: writer, addressing: line.addressing, receipt });
        }
        ticks
    }

    /// Writes `text` to `to` under `id`, sealed for each of `targets`, with all of which there must be a session.
    pub fn write(
        &mut self,
        id: String,
        to: &PhoneNumber,
        text: &str,
        addressing: Namespace,
        targets: &[DeviceAddress],
    ) -> Result<Vec<Delivery>> {
        let sent = Sent { id: id.clone(), to: to.clone(), text: text.to_owned(), addressing };
        let deliveries = targets.iter().map(|target| self.seal(&sent, target, 0)).collect::<Result<Vec<_>>>()?;
        self.sent.push_back(sent);
        if self.sent.len() > SENT_LIMIT {
            self.sent.pop_front();
        }
        self.show(Shown {
            from: self.own.clone(),
            id,
            text: text.to_owned(),
            times_received: 0,
            status: Status::Sent,
            chat: to.clone(),
            direction: Direction::Out,
            device: 0,
            addressing,
            at: stanza::now(),
        });
        Ok(deliveries)
    }

    /// Seals a message once more for a device that could not open it.
    pub fn repeat(&mut self, id: &str, to: &DeviceAddress, count: u32) -> Result<Delivery> {
        let found = self.sent.iter().rev().find(|sent| sent.id == id).cloned();
        let sent = found.ok_or(SandboxError::NotFound("message to repeat"))?;
        self.seal(&sent, to, count)
    }

    fn seal(&mut self, sent: &Sent, target: &DeviceAddress, count: u32) -> Result<Delivery> {
        let chat = sent.addressing.user(&sent.to);
        let message = wa::Message { conversation: Some(sent.text.clone()), ..Default::default() };
        let own_device = target.phone == self.own;
        let message = if own_device { wrap_device_sent(message, chat.to_string()) } else { message };
        let sealed = self.signal.seal(target, &MessageUtils::encode_and_pad(&message))?;
        let recipient = own_device.then_some(chat);
        let envelope = Envelope { id: &sent.id, addressing: sent.addressing, recipient, peer: false, count };
        Ok(self.envelope(target, envelope, sealed))
    }

    /// The keys a linked device needs to read the account's settings.
    pub fn share_keys(&mut self, to: &DeviceAddress) -> Result<Delivery> {
        let message = self.app_state.share();
        let sealed = self.signal.seal(to, &MessageUtils::encode_and_pad(&message))?;
        let id = fresh_id("3A");
        let addressing = Namespace::Phone;
        Ok(self.envelope(to, Envelope { id: &id, addressing, recipient: None, peer: true, count: 0 }, sealed))
    }

    fn envelope(&self, to: &DeviceAddress, envelope: Envelope<'_>, sealed: Sealed) -> Delivery {
        let mut enc = tag("enc").attr("v", "2").attr("type", sealed.kind);
        if envelope.count > 0 {
            enc = enc.attr("count", envelope.count);
        }
        let (alternative, other) = match envelope.addressing {
            Namespace::Phone => ("sender_lid", Namespace::Hidden),
            Namespace::Hidden => ("sender_pn", Namespace::Phone),
        };
        let mut node = tag("message")
            .attr("from", envelope.addressing.device(&self.address()))
            .attr("id", envelope.id)
            .attr("type", "text")
            .attr("t", stanza::now())
            .attr("notify", &self.name)
            .attr(alternative, other.user(&self.own));
        if let Some(recipient) = envelope.recipient {
            node = node.attr("recipient", recipient);
        }
        if envelope.peer {
            node = node.attr("category", "peer");
        }
        let node = node.children([enc.bytes(sealed.bytes).build()]).build();
        Delivery { from: self.address(), to: to.clone(), node }
    }
}

/// What the envelope of an outgoing message says.
struct Envelope<'a> {
    id: &'a str,
    addressing: Namespace,
    recipient: Option<Jid>,
    peer: bool,
    count: u32,
}

/// The envelope of an incoming message.
struct Arrival {
    from: DeviceAddress,
    addressing: Namespace,
    recipient: Option<Jid>,
    peer: bool,
    key: ShownKey,
}

impl Arrival {
    fn read(from: &DeviceAddress, node: &Node) -> Option<Self> {
        let recipient = jid(node, "recipient");
        let chat = recipient.as_ref().and_then(resolve).map_or_else(|| from.phone.clone(), |(peer, _)| peer.phone);
        Some(Self {
            from: from.clone(),
            addressing: resolve(&jid(node, "from")?)?.1,
            peer: attr(node, "category").is_some_and(|category| category == "peer"),
            key: ShownKey { from: from.phone.clone(), chat, id: attr(node, "id")?.into_owned() },
            recipient,
        })
    }
}

fn repeat_request(from: &DeviceAddress, node: &Node) -> Option<Errand> {
    let retry = node.get_optional_child("retry")?;
    let id = attr(retry, "id")?.into_owned();
    let count = attr(retry, "count").and_then(|count| count.parse().ok()).unwrap_or(1);
    let registration = stanza::child_bytes(node, "registration").and_then(|bytes| stanza::number(&bytes));
    let keys = node.get_optional_child("keys").zip(registration);
    let keys = keys.and_then(|(keys, registration_id)| Bundle::from_retry(keys, registration_id));
    (count <= u32::from(ASK_AT_MOST)).then(|| Errand::Repeat { to: from.clone(), id, count, keys })
}

fn in_words(message: &wa::Message) -> String {
    if let Some(text) = &message.conversation {
        return text.clone();
    }
    if let Some(text) = message.extended_text_message.as_option().and_then(|extended| extended.text.clone()) {
        return text;
    }
    if let Some(reaction) = message.reaction_message.as_option() {
        return format!("[reaction {}]", reaction.text.clone().unwrap_or_default());
    }
    if let Some(image) = message.image_message.as_option() {
        return format!("[image] {}", image.caption.clone().unwrap_or_default());
    }
    "[message]".to_owned()
}
