//! Something that a wait for sockets can wait for beside them, and that another thread makes ready.

use std::io::Result;

#[cfg(unix)]
pub(super) use rustix::fd::OwnedFd as Waker;

/// The end that is waited for, and the end that [`wake`] takes.
#[cfg(unix)]
pub(super) fn waker() -> Result<(Waker, Waker)> {
    Ok(rustix::pipe::pipe()?)
}

/// Makes the other end ready for good.
#[cfg(unix)]
pub(super) fn wake(sender: &Waker) {
    let _ = rustix::io::write(sender, &[1]);
}

/// Only sockets can be waited for: one that sends itself something.
#[cfg(not(unix))]
pub(super) use std::net::UdpSocket as Waker;

#[cfg(not(unix))]
pub(super) fn waker() -> Result<(Waker, Waker)> {
    let socket = Waker::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
    socket.connect(socket.local_addr()?)?;
    let sender = socket.try_clone()?;
    Ok((socket, sender))
}

#[cfg(not(unix))]
pub(super) fn wake(sender: &Waker) {
    let _ = sender.send(&[1]);
}
