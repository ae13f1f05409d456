//! WhatsApp, the session to it and the pump between session and machine. The pump works as the shell's: one event at
//! a time, looked up on disk when it is taken, told to the machine a little later, inbound messages waited for.

use std::collections::VecDeque;
use std::time::Duration;

use switchboard::domain::change::SeenKey;
use switchboard::domain::close::CloseReason;
use switchboard::domain::id::MessageSeq;
use switchboard::domain::lifecycle::{self, Purpose, State};
use switchboard::domain::limiter::LockAnswer;
use switchboard::domain::message::{Content, Direction, FailureCode, MessageStatus, Progress};
use switchboard::domain::number::{Arrived, Input, Receipted, Retry, Transmit};
use switchboard::domain::time::Timestamp;

use super::callers::Waiter;
use super::people::{self, Known};
use super::promises::InboundName;
use super::world::{Happens, World};

/// Inbound messages handed over at once.
const BATCH_MAX: usize = 32;

/// What a session tells the pump.
#[derive(Debug, Clone)]
pub(crate) enum Wire {
    Paired,
    Online,
    Alive,
    NotWritten(MessageSeq, Retry),
    Acked(String, Option<u16>),
    Receipts(Vec<String>, MessageStatus),
    Lock(LockAnswer),
    Inbound(Vec<usize>),
    Closed(CloseReason),
}

/// What the pump tells the machine.
#[derive(Debug)]
pub(crate) enum FromSession {
    Life(lifecycle::Input),
    NotWritten(MessageSeq, Retry),
    Acked(String, Option<u16>),
    Receipts(Vec<Receipted>, MessageStatus),
    Lock(LockAnswer),
    Arrived(Vec<Arrived>, Vec<usize>),
    Closed(CloseReason),
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Session {
    no: u64,
    /// There is a socket; without one this only carries the answer to a close.
    real: bool,
    online: bool,
    /// Asked to close.
    closing: bool,
    /// The socket is gone; the end is on its way through the pump.
    dead: bool,
    queue: VecDeque<Wire>,
    pumping: bool,
}

/// A message somebody wrote to the number.
#[derive(Debug)]
struct Inbound {
    person: u64,
    known: Known,
    direction: Direction,
    whatsapp_id: String,
    /// Empty: cannot be decrypted.
    text: String,
    /// What it says once its sender repeats it.
    repeated: Option<String>,
    /// Known here as durable: never sent again, except by mistake.
    acked: bool,
    /// The connection it was last handed to.
    given_to: u64,
}

/// WhatsApp's servers and everybody's phones.
#[derive(Debug, Default)]
pub(crate) struct Whatsapp {
    inbound: Vec<Inbound>,
    unacked: usize,
    receipts: VecDeque<(String, MessageStatus)>,
    /// People whose two addresses were seen together in an acknowledged message.
    both_known: Vec<u64>,
}

impl Whatsapp {
    pub(crate) fn is_idle(&self) -> bool {
        self.unacked == 0 && self.receipts.is_empty()
    }
}

fn digest(text: &str) -> [u8; 16] {
    let mut digest = [0; 16];
    digest[..text.len()].copy_from_slice(text.as_bytes());
    digest
}

impl World {
    // === sessions ===

    pub(crate) fn open(&mut self, purpose: Purpose) {
        let two = self.session.as_ref().is_some_and(|session| session.real);
        assert!(!two, "a second session is opened");
        self.figures.connections += 1;
        let no = self.new_session(true);
        if purpose == Purpose::Pair {
            self.disk.has_credentials = false;
        }
        let delay = self.hop() * 3;
        self.inside(delay, Happens::SessionOpens(no, purpose));
    }

    fn new_session(&mut self, real: bool) -> u64 {
        let no = self.next_connection;
        self.next_connection += 1;
        let (online, closing, dead, pumping) = (false, false, false, false);
        self.session = Some(Session { no, real, online, closing, dead, queue: VecDeque::new(), pumping });
        no
    }

    pub(crate) fn close(&mut self) {
        let delay = self.hop();
        match &mut self.session {
            None => {
                let no = self.new_session(false);
                self.inside(0, Happens::Arrives(no, FromSession::Closed(CloseReason::Requested)));
            }
            Some(session) if session.closing || session.dead => {}
            Some(session) => {
                session.closing = true;
                let no = session.no;
                self.inside(delay, Happens::Emits(no, Wire::Closed(CloseReason::Requested)));
            }
        }
    }

    /// The process is gone, and every socket with it.
    pub(crate) fn connection_lost(&mut self) {
        self.session = None;
    }

    pub(crate) fn session_opens(&mut self, no: u64, purpose: Purpose) {
        if purpose == Purpose::Pair {
            if self.fault(self.plan.no_login) {
                return self.emit(no, Wire::Closed(CloseReason::PairingEnded));
            }
            if self.session.as_ref().is_none_or(|session| session.no != no || session.dead) {
                return;
            }
            self.disk.has_credentials = true;
            self.emit(no, Wire::Paired);
            if self.rng.chance(500) {
                return self.emit(no, Wire::Closed(CloseReason::Recycled));
            }
        }
        if self.fault(self.plan.no_login) {
            let reason = self.close_reason();
            return self.emit(no, Wire::Closed(reason));
        }
        // What waited in the queue is handed over before or after the login is told.
        let before = self.rng.chance(500);
        if before {
            self.hand_over(no);
        }
        self.emit(no, Wire::Online);
        self.hand_over(no);
        for (whatsapp_id, status) in std::mem::take(&mut self.whatsapp.receipts) {
            self.emit(no, Wire::Receipts(vec![whatsapp_id], status));
        }
    }

    fn close_reason(&mut self) -> CloseReason {
        if !self.fault(self.plan.hard_close) {
            let soft = [
                CloseReason::Recycled,
                CloseReason::ConnectionLost,
                CloseReason::Unresponsive,
                CloseReason::ServerError { code: 503 },
                CloseReason::HandshakeSilent,
                CloseReason::Crashed,
            ];
            return soft[self.rng.index(soft.len())].clone();
        }
        let until = Some(Timestamp(self.now + self.rng.below(600_000)));
        let hard = [
            CloseReason::RateLimited,
            CloseReason::TemporarilyBanned { code: 101, until },
            CloseReason::TemporarilyBanned { code: 101, until: None },
            CloseReason::LoggedOut { code: 401 },
            CloseReason::Banned,
            CloseReason::Replaced,
            CloseReason::ClientOutdated,
            CloseReason::HandshakeRefused,
            CloseReason::NotWellFormed,
            CloseReason::Refused { code: 418 },
        ];
        hard[self.rng.index(hard.len())].clone()
    }

    /// The server or the network ends the connection.
    pub(crate) fn cut(&mut self) {
        if let Some(no) = self.session.as_ref().map(|session| session.no) {
            let reason = self.close_reason();
            self.emit(no, Wire::Closed(reason));
        }
    }

    pub(crate) fn ping(&mut self) {
        if let Some(no) = self.session.as_ref().map(|session| session.no) {
            self.emit(no, Wire::Alive);
        }
    }

    /// A session tells something; after its end it tells nothing.
    pub(crate) fn emit(&mut self, no: u64, wire: Wire) {
        let Some(session) = self.session.as_mut().filter(|session| session.no == no && session.real && !session.dead)
        else {
            return;
        };
        match wire {
            Wire::Closed(_) => session.dead = true,
            Wire::Online => session.online = true,
            _ => {}
        }
        session.queue.push_back(wire);
        if !session.pumping {
            session.pumping = true;
            let delay = self.hop();
            self.inside(delay, Happens::Pumps(no));
        }
    }

    // === the pump ===

    pub(crate) fn pump(&mut self, no: u64) {
        let Some(session) = self.session.as_mut().filter(|session| session.no == no) else { return };
        let Some(wire) = session.queue.pop_front() else {
            session.pumping = false;
            return;
        };
        let delay = self.hop();
        let waits = matches!(wire, Wire::Inbound(_));
        if let Some(event) = self.resolve(wire) {
            self.inside(delay, Happens::Arrives(no, event));
        }
        if !waits {
            self.inside(delay, Happens::Pumps(no));
        }
    }

    fn resolve(&self, wire: Wire) -> Option<FromSession> {
        Some(match wire {
            Wire::Paired => FromSession::Life(lifecycle::Input::Paired),
            Wire::Online => FromSession::Life(lifecycle::Input::Online),
            Wire::Alive => FromSession::Life(lifecycle::Input::Alive),
            Wire::NotWritten(seq, retry) => FromSession::NotWritten(seq, retry),
            Wire::Acked(whatsapp_id, error) => FromSession::Acked(whatsapp_id, error),
            Wire::Lock(answer) => FromSession::Lock(answer),
            Wire::Closed(reason) => FromSession::Closed(reason),
            Wire::Receipts(whatsapp_ids, status) => {
                let messages: Vec<_> = whatsapp_ids.iter().filter_map(|id| self.receipted(id)).collect();
                if messages.is_empty() {
                    return None;
                }
                FromSession::Receipts(messages, status)
            }
            Wire::Inbound(which) => {
                FromSession::Arrived(which.iter().map(|index| self.arrived(*index)).collect(), which)
            }
        })
    }

    fn receipted(&self, whatsapp_id: &str) -> Option<Receipted> {
        let disk = &self.disk.visible;
        let record = &disk.messages[disk.whatsapp_ids.get(whatsapp_id)?];
        Some(Receipted {
            seq: record.seq,
            whatsapp_id: record.whatsapp_id.clone(),
            chat: record.chat,
            to: disk.chats.get(&record.chat)?.clone(),
            correlation_id: None,
            progress: disk.progress.get(&record.seq).copied().unwrap_or(Progress::QUEUED),
        })
    }

    fn arrived(&self, index: usize) -> Arrived {
        let message = &self.whatsapp.inbound[index];
        let contact = people::contact(message.person, message.known);
        let disk = &self.disk.visible;
        let chat = disk.chat_of(&contact);
        let digest = digest(&message.text);
        let key = chat.map(|chat| {
            let (direction, whatsapp_id) = (message.direction, message.whatsapp_id.clone());
            SeenKey { chat, direction, whatsapp_id, digest }
        });
        let seen = key.as_ref().is_some_and(|key| disk.seen.contains_key(key));
        let placeholder = if seen { None } else { key.and_then(|key| disk.placeholder(key)) };
        let content =
            if message.text.is_empty() { Content::Undecryptable } else { Content::Text(message.text.clone()) };
        Arrived {
            contact,
            chat,
            seen,
            standing: disk.standing(chat),
            placeholder: placeholder.map(Box::new),
            direction: message.direction,
            whatsapp_id: message.whatsapp_id.clone(),
            digest,
            sender_name: None,
            content,
            written_at: Timestamp(self.now),
        }
    }

    /// The machine is told, unless the event is of an older connection.
    pub(crate) fn session_says(&mut self, no: u64, event: FromSession) {
        if self.session.as_ref().is_none_or(|session| session.no != no) {
            return;
        }
        match event {
            FromSession::Life(input) => self.step(Input::Life(input)),
            FromSession::NotWritten(seq, retry) => {
                if retry != Retry::Unknown {
                    self.promises.landed(seq, &self.disk.visible);
                }
                self.step(Input::NotWritten { seq, retry });
            }
            FromSession::Acked(whatsapp_id, error) => {
                if let Some(seq) = self.disk.visible.whatsapp_ids.get(&whatsapp_id).copied()
                    && self.promises.landed(seq, &self.disk.visible)
                {
                    self.promises.answer_told(error, self.now);
                }
                self.step(Input::Acked { whatsapp_id, error });
            }
            FromSession::Receipts(messages, status) => {
                for message in &messages {
                    self.promises.landed(message.seq, &self.disk.visible);
                }
                let reply = self.reply_id();
                self.waiters.insert(reply, Waiter::Receipts);
                self.step(Input::Receipts { messages, status, at: Timestamp(self.now), reply });
            }
            FromSession::Lock(answer) => {
                self.promises.lock_told(answer, self.now);
                self.step(Input::Lock(answer));
            }
            FromSession::Arrived(messages, which) => {
                for message in messages.iter().filter(|message| message.direction == Direction::Inbound) {
                    self.promises.somebody_wrote(people::person(&message.contact));
                }
                let reply = self.reply_id();
                self.waiters.insert(reply, Waiter::Inbound(no, which));
                self.step(Input::Arrived(messages, reply));
            }
            FromSession::Closed(reason) => {
                self.session = None;
                self.promises.all_landed();
                let backoff = Duration::from_millis(self.rng.below(5000));
                self.step(Input::Life(lifecycle::Input::Closed { reason, backoff }));
            }
        }
    }

    // === sending ===

    pub(crate) fn transmit(&mut self, transmit: Transmit) {
        let life = self.number.as_ref().map(|number| number.life().clone());
        let Some(life) = life else { return };
        self.promises.transmitting(&transmit, &life, &self.disk.durable, self.now);
        let Some(session) = &self.session else { panic!("a message is transmitted without a session") };
        assert!(session.real, "a message is transmitted without a session");
        let no = session.no;
        let record = &self.disk.visible.messages[&transmit.seq];
        let kept = self.disk.visible.bodies.get(&transmit.seq).unwrap_or(&record.content);
        let content = transmit.content.clone().unwrap_or_else(|| kept.clone());
        assert_eq!(content, *kept, "{:?} is transmitted with another text", transmit.seq);
        let delay = self.hop();
        self.outside(delay, Happens::Writes(no, transmit, content));
    }

    pub(crate) fn session_writes(&mut self, no: u64, transmit: &Transmit, content: &Content) {
        if self.session.as_ref().is_none_or(|session| session.no != no || session.dead) {
            return;
        }
        let seq = transmit.seq;
        if self.fault(self.plan.not_written) {
            let never = Retry::Never(FailureCode::RejectedByWhatsapp);
            let retry = self.rng.pick(&[Retry::WhenOnline, Retry::Later, Retry::Later, Retry::Unknown, never]);
            if retry == Retry::Unknown && self.rng.chance(500) {
                self.server_takes(no, transmit, content);
            }
            return self.emit(no, Wire::NotWritten(seq, retry));
        }
        if self.fault(self.plan.cut_on_send) {
            if self.rng.chance(500) {
                self.server_takes(no, transmit, content);
            }
            return self.cut();
        }
        if self.fault(self.plan.refused) {
            let error = if self.rng.chance(self.plan.locked) {
                self.rng.pick(&[463, 475])
            } else {
                self.rng.pick(&[400, 404, 421, 479, 429, 500, 503, 503, 999])
            };
            let delay = self.hop();
            self.outside(delay, Happens::Emits(no, Wire::Acked(transmit.whatsapp_id.clone(), Some(error))));
            if self.fault(self.plan.ack_odd) {
                self.outside(delay * 2, Happens::Emits(no, Wire::Acked(transmit.whatsapp_id.clone(), Some(error))));
            }
            return;
        }
        self.server_takes(no, transmit, content);
    }

    /// WhatsApp says how long new chats are locked, if it says anything.
    pub(crate) fn ask_lock(&mut self) {
        let Some(no) = self.session.as_ref().map(|session| session.no) else { return };
        let until = Timestamp(self.now + self.rng.below(7_200_000));
        let answers = [Some(LockAnswer::Until(until)), Some(LockAnswer::Open), Some(LockAnswer::None), None];
        let delay = self.hop() * 2;
        if let Some(answer) = self.rng.pick(&answers) {
            self.outside(delay, Happens::Emits(no, Wire::Lock(answer)));
        }
    }

    fn server_takes(&mut self, no: u64, transmit: &Transmit, content: &Content) {
        let shows = self.promises.arrived_at_phone(transmit, content.text());
        self.promises.not_withdrawn(transmit.seq);
        let acks = if self.fault(self.plan.ack_odd) { self.rng.below(3) } else { 1 };
        for _ in 0..acks {
            let delay = self.hop();
            self.outside(delay, Happens::Emits(no, Wire::Acked(transmit.whatsapp_id.clone(), None)));
        }
        if !shows {
            return;
        }
        // Receipts come in any order, and more than once.
        for status in [MessageStatus::Delivered, MessageStatus::Read] {
            for _ in 0..self.rng.pick(&[0, 1, 1, 1, 2]) {
                let delay = self.hop() + self.rng.below(2000);
                self.outside(delay, Happens::Receipt(transmit.whatsapp_id.clone(), status));
            }
        }
    }

    pub(crate) fn receipt(&mut self, whatsapp_id: String, status: MessageStatus) {
        match &self.session {
            Some(session) if session.online && !session.dead => {
                let no = session.no;
                self.emit(no, Wire::Receipts(vec![whatsapp_id], status));
            }
            _ => self.whatsapp.receipts.push_back((whatsapp_id, status)),
        }
    }

    // === receiving ===

    /// Somebody writes; sometimes the same id carries another text.
    pub(crate) fn new_inbound(&mut self) {
        let person = self.rng.below(self.plan.people);
        let count = self.whatsapp.inbound.len();
        let known = if !people::has_lid(person) {
            Known::Phone
        } else if self.whatsapp.both_known.contains(&person) && self.rng.chance(300) {
            Known::Lid
        } else {
            Known::Both
        };
        let whatsapp_id = if count > 0 && self.rng.chance(50) {
            self.whatsapp.inbound[self.rng.index(count)].whatsapp_id.clone()
        } else {
            format!("IN{count}")
        };
        let direction = if self.rng.chance(100) { Direction::OwnDevice } else { Direction::Inbound };
        let text = format!("in {count}");
        let (text, repeated) =
            if self.rng.chance(self.plan.opaque) { (String::new(), Some(text)) } else { (text, None) };
        let (acked, given_to) = (false, 0);
        let message = Inbound { person, known, direction, whatsapp_id, text, repeated, acked, given_to };
        self.whatsapp.inbound.push(message);
        self.whatsapp.unacked += 1;
        self.hand_over_if_online();
    }

    pub(crate) fn hand_over_if_online(&mut self) {
        if let Some(session) = self.session.as_ref().filter(|session| session.online && !session.dead) {
            let no = session.no;
            self.hand_over(no);
        }
    }

    /// Gives a session what it was not given yet and is not known to be durable.
    fn hand_over(&mut self, no: u64) {
        let mut batch = Vec::new();
        let mut left = self.whatsapp.unacked;
        for index in (0..self.whatsapp.inbound.len()).rev() {
            if left == 0 {
                break;
            }
            let message = &mut self.whatsapp.inbound[index];
            if !message.acked {
                left -= 1;
                if message.given_to != no {
                    message.given_to = no;
                    batch.push(index);
                }
            }
        }
        batch.reverse();
        for part in batch.chunks(BATCH_MAX) {
            self.emit(no, Wire::Inbound(part.to_vec()));
        }
    }

    /// The server forgets that it was told, and sends something again.
    pub(crate) fn repeat_inbound(&mut self) {
        let count = self.whatsapp.inbound.len();
        let online = self.session.as_ref().filter(|session| session.online && !session.dead).map(|session| session.no);
        let (Some(no), true) = (online, count > 0) else { return };
        let first = self.rng.index(count);
        let mut batch: Vec<usize> = (first..count.min(first + 3)).collect();
        if self.rng.chance(200) {
            batch.push(first);
        }
        self.emit(no, Wire::Inbound(batch));
    }

    pub(crate) fn inbound_durable(&mut self, no: u64, which: Vec<usize>) {
        for index in &which {
            let message = &self.whatsapp.inbound[*index];
            let name: InboundName =
                (message.person, message.direction, message.whatsapp_id.clone(), message.text.clone());
            self.promises.inbound_acknowledged(&name);
        }
        let delay = self.hop();
        self.inside(delay, Happens::InboundAcked(no, which));
        self.inside(delay, Happens::Pumps(no));
    }

    pub(crate) fn inbound_acked(&mut self, no: u64, which: &[usize]) {
        if self.session.as_ref().is_none_or(|session| session.no != no || session.dead) {
            return;
        }
        for index in which {
            self.repeat_readable(*index);
            let message = &mut self.whatsapp.inbound[*index];
            self.whatsapp.unacked -= usize::from(!message.acked);
            message.acked = true;
            if message.known == Known::Both && !self.whatsapp.both_known.contains(&message.person) {
                self.whatsapp.both_known.push(message.person);
            }
        }
    }

    /// The sender of a message that could not be decrypted is asked for it again, and repeats it sooner or later.
    fn repeat_readable(&mut self, index: usize) {
        let message = &mut self.whatsapp.inbound[index];
        let Some(text) = message.repeated.take() else { return };
        let (person, known, direction) = (message.person, message.known, message.direction);
        let whatsapp_id = message.whatsapp_id.clone();
        let (repeated, acked, given_to) = (None, false, 0);
        let message = Inbound { person, known, direction, whatsapp_id, text, repeated, acked, given_to };
        self.whatsapp.inbound.push(message);
        self.whatsapp.unacked += 1;
        if self.rng.chance(500) {
            self.hand_over_if_online();
        }
    }

    /// Whether the number needs the operator's hand.
    pub(crate) fn needs_hand(&self) -> Option<lifecycle::Input> {
        match self.state()? {
            State::Unlinked | State::LoggedOut => Some(lifecycle::Input::Pair),
            State::Stopped | State::Replaced | State::Parked { .. } => Some(lifecycle::Input::Start),
            _ => None,
        }
    }
}
