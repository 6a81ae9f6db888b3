//! One blocking netlink socket: send a request, collect the answers.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};

/// How often an interrupted dump (`NLM_F_DUMP_INTR`, the kernel's tables changed underneath) is
/// started again before it is reported.
const DUMP_ATTEMPTS: usize = 5;

/// A socket of one netlink family (`NETLINK_ROUTE`, `NETLINK_NETFILTER`), in the network
/// namespace of the thread that opened it.
pub struct NetlinkSocket {
    socket: Socket,
    sequence: u32,
}

impl NetlinkSocket {
    /// Opens a socket; `protocol` is one of `netlink_sys::protocols`.
    pub fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // A dump of 100,000 conntrack entries must not end in ENOBUFS.
        socket.set_rx_buf_sz(4 * 1024 * 1024_u32).ok();
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends one message and waits for the kernel's acknowledgement. `flags` are added to
    /// `NLM_F_REQUEST | NLM_F_ACK`. Answers before the acknowledgement are returned.
    pub fn request<I>(&mut self, message: I, flags: u16) -> io::Result<Vec<I>>
    where
        I: NetlinkSerializable + NetlinkDeserializable,
    {
        let mut answers = Vec::new();
        self.exchange(message, NLM_F_REQUEST | NLM_F_ACK | flags, &mut |answer| {
            answers.push(answer)
        })?;
        Ok(answers)
    }

    /// Asks for a dump and hands every entry to `each`. A dump that the kernel reports as
    /// interrupted is begun anew, so `each` may see an entry twice.
    pub fn dump<I>(&mut self, message: I, mut each: impl FnMut(I)) -> io::Result<()>
    where
        I: NetlinkSerializable + NetlinkDeserializable + Clone,
    {
        for _ in 0..DUMP_ATTEMPTS {
            if !self.exchange(message.clone(), NLM_F_REQUEST | NLM_F_DUMP, &mut each)? {
                return Ok(());
            }
        }
        Err(io::Error::other("the kernel's table kept changing during a netlink dump"))
    }

    /// Returns whether a dump was interrupted.
    fn exchange<I>(&mut self, message: I, flags: u16, each: &mut dyn FnMut(I)) -> io::Result<bool>
    where
        I: NetlinkSerializable + NetlinkDeserializable,
    {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut request = vec![0; message.buffer_len()];
        message.serialize(&mut request);
        self.socket.send(&request, 0)?;

        let mut interrupted = false;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while rest.len() >= 16 {
                let buffer = NetlinkBuffer::new_checked(rest).map_err(malformed)?;
                let length = (buffer.length() as usize + 3) & !3;
                interrupted |= buffer.flags() & NLM_F_DUMP_INTR != 0;
                let mine = buffer.sequence_number() == self.sequence;
                let answer = NetlinkMessage::<I>::deserialize(rest).map_err(malformed)?;
                match answer.payload {
                    _ if !mine => {}
                    NetlinkPayload::Done(_) => return Ok(interrupted),
                    NetlinkPayload::Error(error) => match error.code {
                        None => return Ok(interrupted),
                        Some(_) => return Err(error.to_io()),
                    },
                    NetlinkPayload::InnerMessage(inner) => each(inner),
                    _ => {}
                }
                rest = rest.get(length..).unwrap_or_default();
            }
        }
    }
}

/// The kernel's table changed while it was dumped (linux/netlink.h).
const NLM_F_DUMP_INTR: u16 = 0x10;

fn malformed(error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed netlink message: {error}"))
}
