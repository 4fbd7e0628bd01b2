//! A child in the foreground of the terminal: it gets the signals that this process gets, and its stops are this one's.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, getpgrp, getpid, kill_process, waitid};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

/// After this long a child is still stopped, and not just about to go on with this process.
const STOPPED_FOR: Duration = Duration::from_millis(50);

/// Runs the command to its end and returns its exit code, 128 and the signal if one ended it.
pub(crate) fn run(mut command: Command, mut signals: Signals) -> std::io::Result<u8> {
    let mut child = command.spawn()?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    // Empty once the child's number may be another process's.
    let living = Arc::new(Mutex::new(pid));
    let (handle, target) = (signals.handle(), Arc::clone(&living));
    let forward = std::thread::spawn(move || {
        for signal in signals.forever() {
            let target = target.lock().unwrap_or_else(|e| e.into_inner());
            if let (Some(signal), Some(pid)) = (to_forward(signal), *target) {
                // It may have ended meanwhile.
                let _ = kill_process(pid, signal);
            }
        }
    });
    if let Some(pid) = pid {
        wait_for_end(pid);
    }
    *living.lock().unwrap_or_else(|e| e.into_inner()) = None;
    handle.close();
    let _ = forward.join();
    child.wait().map(code)
}

/// Waits until the child has ended, but leaves its status.
fn wait_for_end(pid: Pid) {
    loop {
        let ends_or_stops = WaitIdOptions::EXITED | WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT;
        match waitid(WaitId::Pid(pid), ends_or_stops) {
            Ok(Some(status)) if status.stopped() => {
                std::thread::sleep(STOPPED_FOR);
                let still = waitid(WaitId::Pid(pid), WaitIdOptions::STOPPED | WaitIdOptions::NOHANG);
                if matches!(still, Ok(Some(_))) && is_in_foreground() {
                    // The shell gets the terminal back. It goes on with SIGCONT, which the child gets too.
                    let _ = kill_process(getpid(), Signal::STOP);
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            Ok(_) | Err(_) => return,
        }
    }
}

/// The signal for the child: the terminal gives its own to both.
fn to_forward(signal: i32) -> Option<Signal> {
    match signal {
        SIGTERM => Some(Signal::TERM),
        SIGHUP => Some(Signal::HUP),
        SIGCONT => Some(Signal::CONT),
        SIGINT | SIGQUIT if is_in_foreground() => None,
        SIGINT => Some(Signal::INT),
        SIGQUIT => Some(Signal::QUIT),
        _ => None,
    }
}

/// Whether the terminal's keys reach this process and its children.
fn is_in_foreground() -> bool {
    let terminal = std::fs::File::open("/dev/tty");
    terminal.is_ok_and(|terminal| rustix::termios::tcgetpgrp(terminal).is_ok_and(|group| group == getpgrp()))
}

fn code(status: ExitStatus) -> u8 {
    let number = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(number).unwrap_or(1)
}
