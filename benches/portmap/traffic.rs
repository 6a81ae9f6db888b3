//! Servers in pods, and clients that say how fast they were. Sockets belong to the network namespace
//! of the thread that makes them; servers stay until the process ends.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::socket::{Backlog, listen, setsockopt, sockopt::Linger};
use nix::unistd::Pid;

use crate::Res;
use crate::rig::{Netns, on_new_thread};

/// Bytes that are read or written at once.
const PIECE: usize = 256 << 10;
/// A lost packet shows as an error, not as silence.
const PATIENCE: Duration = Duration::from_secs(10);

/// Accepts connections in a pod, and ends them.
pub fn serve_connections(pod: &Netns, port: u16) -> Res<()> {
    let listener = listener(pod, port)?;
    thread::spawn(move || {
        for stream in listener.incoming() {
            drop(stream);
        }
    });
    Ok(())
}

/// Accepts the connections of [`Exchanges`] in a pod, on the processor that their clients are on.
pub fn serve_exchanges(pod: &Netns, port: u16) -> Res<()> {
    let listener = listener(pod, port)?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that is gone has got what it wanted.
            thread::spawn(move || pin().and_then(|()| Ok(answer(stream)?)));
        }
    });
    Ok(())
}

/// Sends datagrams in a pod back to where they come from.
pub fn serve_datagrams(pod: &Netns, port: u16) -> Res<()> {
    let pod = pod.handle()?;
    let socket = on_new_thread(move || {
        pod.enter()?;
        Ok(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?)
    })?;
    thread::spawn(move || {
        let mut bytes = [0; 64];
        // Neither an ICMP error nor a peer that is gone is a reason to stop.
        loop {
            if let Ok((length, peer)) = socket.recv_from(&mut bytes) {
                socket.send_to(&bytes[..length], peer).ok();
            }
        }
    });
    Ok(())
}

fn listener(pod: &Netns, port: u16) -> Res<TcpListener> {
    let pod = pod.handle()?;
    on_new_thread(move || {
        pod.enter()?;
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
        // A full queue would cost the client a second per connection.
        listen(&listener, Backlog::MAXALLOWABLE)?;
        Ok(listener)
    })
}

/// Moves the calling thread to one processor, the same for all: where the scheduler puts the two
/// ends of a connection makes more of a difference than anything between them.
pub fn pin() -> Res<()> {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this)?;
    let last = (0..CpuSet::count()).rev().find(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    let mut one = CpuSet::new();
    one.set(last.ok_or("no processor is allowed")?)?;
    Ok(sched_setaffinity(this, &one)?)
}

/// Opens and resets connections, one after the other, and returns how many per second.
pub fn connections(to: SocketAddr, time: Duration) -> Res<f64> {
    let reset = libc::linger { l_onoff: 1, l_linger: 0 };
    per_second(time, || {
        let stream = TcpStream::connect(to)?;
        setsockopt(&stream, Linger, &reset)?;
        Ok(())
    })
    .map_err(|e| format!("connecting to {to}: {e}").into())
}

/// Sends datagrams and waits for each to come back; how many per second.
pub fn datagrams(to: SocketAddr, time: Duration) -> Res<f64> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(to)?;
    let mut bytes = [0; 64];
    per_second(time, || {
        socket.send(b"?")?;
        socket.recv(&mut bytes)?;
        Ok(())
    })
    .map_err(|e| format!("datagrams to {to}: {e}").into())
}

fn per_second(time: Duration, mut work: impl FnMut() -> Res<()>) -> Res<f64> {
    let start = Instant::now();
    let mut count = 0_u32;
    while start.elapsed() < time {
        work()?;
        count += 1;
    }
    Ok(f64::from(count) / start.elapsed().as_secs_f64())
}

/// An established connection. A request says in 16 bytes how many more it has and how many the answer
/// shall have.
pub struct Exchanges {
    stream: TcpStream,
    to: SocketAddr,
    buffer: Vec<u8>,
}

impl Exchanges {
    pub fn open(to: SocketAddr) -> Res<Self> {
        let stream = TcpStream::connect(to).map_err(|e| format!("connecting to {to}: {e}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream, to, buffer: vec![0; PIECE] })
    }

    /// Short requests with an answer of one byte, one after the other: how many per second.
    pub fn requests(&mut self, time: Duration) -> Res<f64> {
        per_second(time, || self.exchange(0, 1))
    }

    /// Bytes per second to the server.
    pub fn upload(&mut self, volume: u64) -> Res<f64> {
        self.throughput(volume, volume, 1)
    }

    /// Bytes per second from the server.
    pub fn download(&mut self, volume: u64) -> Res<f64> {
        self.throughput(volume, 0, volume)
    }

    #[expect(clippy::cast_precision_loss, reason = "volumes fit in a double")]
    fn throughput(&mut self, volume: u64, up: u64, down: u64) -> Res<f64> {
        let start = Instant::now();
        self.exchange(up, down)?;
        Ok(volume as f64 / start.elapsed().as_secs_f64())
    }

    fn exchange(&mut self, up: u64, down: u64) -> Res<()> {
        let mut request = [0; 16];
        request[..8].copy_from_slice(&up.to_be_bytes());
        request[8..].copy_from_slice(&down.to_be_bytes());
        let mut exchange = || -> io::Result<()> {
            self.stream.write_all(&request)?;
            send(&mut self.stream, &self.buffer, up)?;
            receive(&mut self.stream, &mut self.buffer, down)
        };
        exchange().map_err(|e| format!("connection to {}: {e}", self.to).into())
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; PIECE];
    let mut request = [0; 16];
    loop {
        stream.read_exact(&mut request)?;
        let (up, down) = request.split_at(8);
        let length = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_be_bytes);
        receive(&mut stream, &mut buffer, length(up))?;
        send(&mut stream, &buffer, length(down))?;
    }
}

fn send(stream: &mut TcpStream, buffer: &[u8], mut count: u64) -> io::Result<()> {
    while count > 0 {
        let piece = usize::try_from(count).map_or(buffer.len(), |count| count.min(buffer.len()));
        stream.write_all(&buffer[..piece])?;
        count -= piece as u64;
    }
    Ok(())
}

fn receive(stream: &mut TcpStream, buffer: &mut [u8], mut count: u64) -> io::Result<()> {
    while count > 0 {
        let piece = usize::try_from(count).map_or(buffer.len(), |count| count.min(buffer.len()));
        match stream.read(&mut buffer[..piece])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            came => count -= came as u64,
        }
    }
    Ok(())
}
