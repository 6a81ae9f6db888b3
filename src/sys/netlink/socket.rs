//! One blocking netlink socket: send a request, collect the answers.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader,
    NetlinkSerializable, Nla,
};
use netlink_sys::{Socket, SocketAddr};
use nix::unistd::{SysconfVar, sysconf};

/// How often an interrupted dump (`NLM_F_DUMP_INTR`, the kernel's tables changed underneath) is
/// started again before it is reported.
const DUMP_ATTEMPTS: usize = 5;

/// Size of the receive buffer for long lists. The kernel fills dump datagrams as far as the reader's buffer goes,
/// up to 32 KiB (`netlink_recvmsg`, `netlink_dump`), so nothing is gained by more, and no answer to
/// the requests made here is larger.
const DATAGRAM: usize = 32 * 1024;

/// The kernel's own size of a datagram is that of a page, with 8 KiB at most (`NLMSG_GOODSIZE`).
const LARGEST_PAGE: usize = 8192;

/// How many questions are sent at once. Every answer takes up room of the socket until it is read, and
/// the kernel drops those that there is none for.
const QUESTIONS: usize = 16;

/// Two more attempts at a dump with an entry for which the kernel has made too little room: it makes as
/// much as the reader has asked for before, and so not at the first dump, nor at one that fails.
const LARGER_ATTEMPTS: usize = 2;

const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;

/// A message without its netlink header, ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    kind: u16,
    payload: Vec<u8>,
}

impl Message {
    /// A message of type `kind`: the family's fixed header, then attributes.
    pub fn new<N: Nla>(kind: u16, header: &impl Emitable, attributes: &[N]) -> Self {
        let fixed = header.buffer_len();
        let mut payload = vec![0; fixed + attributes.buffer_len()];
        header.emit(&mut payload[..fixed]);
        attributes.emit(&mut payload[fixed..]);
        Self { kind, payload }
    }

    /// A message of one of the netlink-packet crates' own types.
    #[must_use]
    pub fn of(message: &impl NetlinkSerializable) -> Self {
        let mut payload = vec![0; message.buffer_len()];
        message.serialize(&mut payload);
        Self { kind: message.message_type(), payload }
    }

    /// Everything behind the netlink header.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }
}

/// A socket of one netlink family (`NETLINK_ROUTE`, `NETLINK_NETFILTER`), in the network
/// namespace of the thread that opened it.
pub struct NetlinkSocket {
    socket: Socket,
    sequence: u32,
    datagram: Vec<u8>,
}

impl NetlinkSocket {
    /// Opens a socket; `protocol` is one of `netlink_sys::protocols`.
    pub fn open(protocol: isize) -> io::Result<Self> {
        Self::with_room(protocol, DATAGRAM)
    }

    /// As [`NetlinkSocket::open`], for many short answers: the kernel makes room in advance for as much as
    /// the reader takes, which costs it a microsecond a dump beyond a page (6.18).
    pub fn open_for_short(protocol: isize) -> io::Result<Self> {
        let page = sysconf(SysconfVar::PAGE_SIZE)?.and_then(|size| size.try_into().ok());
        Self::with_room(protocol, page.unwrap_or(LARGEST_PAGE).min(LARGEST_PAGE))
    }

    fn with_room(protocol: isize, room: usize) -> io::Result<Self> {
        let socket = Socket::new(protocol)?;
        // Connected to port 0, the socket takes messages from nobody but the kernel. It gets a port of
        // its own with that (`netlink_connect`).
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0, datagram: Vec::with_capacity(room) })
    }

    /// The socket itself, to ask the kernel about it.
    pub(in crate::sys) fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Makes the kernel honour the filters in a dump request of `NETLINK_ROUTE`
    /// (`NETLINK_GET_STRICT_CHK`, Linux 4.20). Older kernels ignore filters; whoever sends one
    /// checks the answers too.
    pub fn filter_dumps(&mut self) {
        self.socket.set_netlink_get_strict_chk(true).ok();
    }

    /// Sends one message and waits for the kernel's acknowledgement. `flags` are added to
    /// `NLM_F_REQUEST | NLM_F_ACK`. Answers before the acknowledgement go through `decode`, which
    /// gets their type and payload; what it returns is collected.
    ///
    /// # Errors
    ///
    /// The kernel's refusal, as its `errno`; what `send` and `recv` return.
    pub fn request<T>(
        &mut self,
        message: &Message,
        flags: u16,
        decode: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        let (answers, _) = self.exchange(message, NLM_F_ACK | flags, decode)?;
        Ok(answers)
    }

    /// Asks questions that have one answer each, all at once: an answer is the kernel's last word, and so
    /// is a refusal. Answers go through `decode`, as for [`NetlinkSocket::request`], and come in the order
    /// of the questions.
    ///
    /// # Errors
    ///
    /// What `send` and `recv` return. A refusal is the answer to its question alone.
    pub fn ask_all<T>(
        &mut self,
        questions: &[Message],
        mut decode: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> io::Result<Vec<io::Result<Option<T>>>> {
        let mut answers = Vec::with_capacity(questions.len());
        for questions in questions.chunks(QUESTIONS) {
            let first = self.sequence.wrapping_add(1);
            let mut request = Vec::new();
            for question in questions {
                self.sequence = self.sequence.wrapping_add(1);
                append(&mut request, question, NLM_F_REQUEST, self.sequence);
            }
            self.socket.send(&request, 0)?;
            let mut next = first;
            while next != self.sequence.wrapping_add(1) {
                self.receive()?;
                let mut rest = self.datagram.as_slice();
                while let Some(answer) = next_answer(&mut rest)? {
                    if answer.sequence != next {
                        continue;
                    }
                    answers.push(match answer.body {
                        Body::End(0) => Ok(None),
                        Body::End(errno) => Err(io::Error::from_raw_os_error(errno)),
                        Body::Entry(kind, payload) => Ok(decode(kind, payload)),
                        Body::Nothing => continue,
                    });
                    next = next.wrapping_add(1);
                }
            }
        }
        Ok(answers)
    }

    /// [`NetlinkSocket::ask_all`] of one question.
    ///
    /// # Errors
    ///
    /// As [`NetlinkSocket::request`].
    pub fn ask<T>(
        &mut self,
        question: &Message,
        decode: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> io::Result<Option<T>> {
        self.ask_all(std::slice::from_ref(question), decode)?.pop().unwrap_or(Ok(None))
    }

    /// Asks for a dump. Every entry goes through `decode`, which gets its type and payload, and
    /// returns `None` for what is of no interest or cannot be read. A dump that the kernel reports
    /// as interrupted is begun anew, and only the answers of the last one are returned.
    ///
    /// # Errors
    ///
    /// As [`NetlinkSocket::request`]; also when every attempt was interrupted.
    pub fn dump<T>(
        &mut self,
        message: &Message,
        mut decode: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        let mut attempts = 0..LARGER_ATTEMPTS;
        loop {
            match uninterrupted(|| self.exchange(message, NLM_F_DUMP, &mut decode)) {
                Err(error)
                    if error.raw_os_error() == Some(libc::EMSGSIZE)
                        && attempts.next().is_some() =>
                {
                    self.datagram.clear();
                    self.datagram.reserve(DATAGRAM);
                }
                result => return result,
            }
        }
    }

    /// Returns the decoded answers, and whether the kernel called the dump inconsistent.
    fn exchange<T>(
        &mut self,
        message: &Message,
        flags: u16,
        mut decode: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> io::Result<(Vec<T>, bool)> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = Vec::new();
        append(&mut request, message, NLM_F_REQUEST | flags, self.sequence);
        self.socket.send(&request, 0)?;

        let mut collected = Vec::new();
        let mut interrupted = false;
        loop {
            self.receive()?;
            let mut rest = self.datagram.as_slice();
            while let Some(answer) = next_answer(&mut rest)? {
                // What is left of an exchange that ended with an error is not for this one.
                if answer.sequence != self.sequence {
                    continue;
                }
                interrupted |= answer.interrupted;
                match answer.body {
                    Body::End(0) => return Ok((collected, interrupted)),
                    Body::End(errno) => return Err(io::Error::from_raw_os_error(errno)),
                    Body::Entry(kind, payload) => collected.extend(decode(kind, payload)),
                    Body::Nothing => {}
                }
            }
        }
    }

    fn receive(&mut self) -> io::Result<()> {
        loop {
            self.datagram.clear();
            // With MSG_TRUNC the length is that of the datagram, not of what fit.
            match self.socket.recv(&mut self.datagram, libc::MSG_TRUNC) {
                Ok(length) if length > self.datagram.len() => {
                    return Err(malformed("a datagram is longer than the buffer"));
                }
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Puts a message behind others, each of which begins at a multiple of four bytes.
fn append(datagram: &mut Vec<u8>, message: &Message, flags: u16, sequence: u32) {
    let mut header = NetlinkHeader::default();
    header.message_type = message.kind;
    header.flags = flags;
    header.sequence_number = sequence;
    let begin = datagram.len();
    let end = begin + header.buffer_len() + message.payload.len();
    header.length = (end - begin) as u32;
    datagram.reserve(end.next_multiple_of(4) - begin);
    datagram.resize(end - message.payload.len(), 0);
    header.emit(&mut datagram[begin..]);
    datagram.extend_from_slice(&message.payload);
    datagram.resize(end.next_multiple_of(4), 0);
}

#[derive(Debug, PartialEq, Eq)]
struct Answer<'a> {
    sequence: u32,
    interrupted: bool,
    body: Body<'a>,
}

#[derive(Debug, PartialEq, Eq)]
enum Body<'a> {
    /// Type and payload.
    Entry(u16, &'a [u8]),
    /// The exchange is over, with this `errno` or 0.
    End(i32),
    Nothing,
}

/// Dumps until one goes through without a change underneath, and returns its answers alone.
fn uninterrupted<T>(mut dump: impl FnMut() -> io::Result<(Vec<T>, bool)>) -> io::Result<Vec<T>> {
    for _ in 0..DUMP_ATTEMPTS {
        let (answers, interrupted) = dump()?;
        if !interrupted {
            return Ok(answers);
        }
    }
    Err(io::Error::other("the kernel's table kept changing during a netlink dump"))
}

/// Takes one message off the front of a datagram.
fn next_answer<'a>(datagram: &mut &'a [u8]) -> io::Result<Option<Answer<'a>>> {
    if datagram.is_empty() {
        return Ok(None);
    }
    let buffer = NetlinkBuffer::new_checked(*datagram).map_err(malformed)?;
    let payload = buffer.payload();
    let body = match buffer.message_type() {
        NLMSG_NOOP => Body::Nothing,
        NLMSG_OVERRUN => return Err(malformed("data was lost")),
        NLMSG_ERROR => {
            let code = payload.first_chunk().ok_or_else(|| malformed("an error without a code"))?;
            Body::End(i32::from_ne_bytes(*code).wrapping_neg())
        }
        // A dump that fails after its first datagram says so in the code of this message
        // (`netlink_dump_done`); a success need not carry one.
        NLMSG_DONE => Body::End(
            payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code).min(0).wrapping_neg()),
        ),
        kind => Body::Entry(kind, payload),
    };
    let answer = Answer {
        sequence: buffer.sequence_number(),
        interrupted: i32::from(buffer.flags()) & libc::NLM_F_DUMP_INTR != 0,
        body,
    };
    let length = (buffer.length() as usize).next_multiple_of(4);
    *datagram = datagram.get(length..).unwrap_or_default();
    Ok(Some(answer))
}

fn malformed(error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed netlink message: {error}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use netlink_packet_core::DefaultNla;
    use netlink_packet_route::link::LinkHeader;

    use super::*;

    fn message(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((16 + payload.len() as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(7_u32.to_ne_bytes());
        bytes.extend(0_u32.to_ne_bytes());
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn bodies(mut datagram: &[u8]) -> Vec<(bool, Option<Vec<u8>>, i32)> {
        let mut all = Vec::new();
        while let Some(answer) = next_answer(&mut datagram).unwrap() {
            assert_eq!(answer.sequence, 7);
            all.push(match answer.body {
                Body::Entry(_, payload) => (answer.interrupted, Some(payload.to_vec()), 0),
                Body::End(errno) => (answer.interrupted, None, errno),
                Body::Nothing => (answer.interrupted, None, -1),
            });
        }
        all
    }

    #[test]
    fn a_datagram_holds_several_messages() {
        let mut datagram = message(20, 2, b"abcde");
        datagram.extend(message(NLMSG_NOOP, 0, b""));
        datagram.extend(message(20, 0x12, b"fg"));
        datagram.extend(message(NLMSG_DONE, 2, &0_i32.to_ne_bytes()));
        assert_eq!(
            bodies(&datagram),
            [
                (false, Some(b"abcde".to_vec()), 0),
                (false, None, -1),
                (true, Some(b"fg".to_vec()), 0),
                (false, None, 0),
            ]
        );
    }

    #[test]
    fn an_interrupted_dump_is_begun_anew_and_given_up_after_some_attempts() {
        let mut dumps = [(vec![1, 2], true), (vec![1], true), (vec![1, 2, 3], false)].into_iter();
        assert_eq!(uninterrupted(|| Ok(dumps.next().unwrap())).unwrap(), [1, 2, 3]);
        let mut attempts = 0;
        let error = uninterrupted(|| {
            attempts += 1;
            Ok((vec![attempts], true))
        });
        assert!(error.unwrap_err().to_string().contains("kept changing"));
        assert_eq!(attempts, DUMP_ATTEMPTS);
    }

    #[test]
    fn both_ends_of_an_exchange_carry_an_errno() {
        let refused = (-libc::ENOENT).to_ne_bytes();
        assert_eq!(bodies(&message(NLMSG_ERROR, 0, &refused))[0].2, libc::ENOENT);
        assert_eq!(bodies(&message(NLMSG_DONE, 0, &refused))[0].2, libc::ENOENT);
        assert_eq!(bodies(&message(NLMSG_ERROR, 0, &[0; 4]))[0].2, 0);
        assert_eq!(bodies(&message(NLMSG_DONE, 0, &[]))[0].2, 0);
        // Some dumps return the number of bytes that they wrote last.
        assert_eq!(bodies(&message(NLMSG_DONE, 0, &9_i32.to_ne_bytes()))[0].2, 0);
    }

    #[test]
    fn nonsense_is_an_error() {
        let whole = message(20, 0, b"abcd");
        for mut broken in [&whole[..10], &whole[..18], &message(NLMSG_ERROR, 0, b"")] {
            let error = next_answer(&mut broken).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn a_request_is_header_then_attributes() {
        let header = LinkHeader::default();
        let attribute = DefaultNla::new(29, vec![8, 0, 0, 0]);
        let mut bytes = Vec::new();
        append(&mut bytes, &Message::new(18, &header, &[attribute]), 0x301, 5);
        assert_eq!(bytes[..16], [40, 0, 0, 0, 18, 0, 1, 3, 5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..32], [0; 16]);
        assert_eq!(bytes[32..], [8, 0, 29, 0, 8, 0, 0, 0]);
    }
}
