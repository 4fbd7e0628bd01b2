//! Ranks that an MPI launcher started (mpirun, srun), over a libmpi found at run time: the road to RDMA through UCX and
//! libfabric, and to job schedulers.
//!
//! Only point-to-point messages are used, so that sums have the same bits as with every other transport and waits have
//! deadlines. The launcher watches over processes; there are no signs of life here. A rank that gives up ends the whole
//! job with `MPI_Abort`, because memory of an unfinished message cannot be taken back.

use std::ffi::{c_char, c_int, c_void};
use std::time::{Duration, Instant};

use libloading::{Library, Symbol};

use crate::error::{CommError, Doing, Failure};
use crate::frame::{Counters, HEADER, Header};
use crate::transport::{Channel, Incoming, Transport, Wait};

/// MPI has no way to sleep until a message comes: it is asked again and again, without pauses before this.
const SPIN: Duration = Duration::from_micros(200);
/// After this, the rank is taken for idle and asks less often.
const IDLE: Duration = Duration::from_millis(20);
/// For ranks to tell their hosts at the start, and to take the last commands at the end.
const PATIENCE: Duration = Duration::from_secs(60);
const THREAD_SERIALIZED: c_int = 2;
/// Both Open MPI and MPICH have it.
const MAX_PROCESSOR_NAME: usize = 256;

/// A communicator, datatype or request: a pointer in Open MPI, an int in MPICH.
type Handle = usize;
type SendReceive = unsafe extern "C" fn(*mut c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle) -> c_int;

struct Functions {
    isend: SendReceive,
    irecv: SendReceive,
    test: unsafe extern "C" fn(*mut Handle, *mut c_int, *mut c_void) -> c_int,
    finalize: unsafe extern "C" fn() -> c_int,
    abort: unsafe extern "C" fn(Handle, c_int) -> c_int,
}

/// One rank of an MPI job.
pub struct Mpi {
    functions: Functions,
    world: Handle,
    byte: Handle,
    status_ignore: *mut c_void,
    rank: usize,
    /// Host name of every rank.
    hosts: Vec<String>,
    sent: Vec<Counters>,
    received: Vec<Counters>,
    /// Commands on their way, which must stay where they are until their requests are done.
    posted: Vec<Posted>,
    left: bool,
    /// Keeps the functions loaded.
    _library: Library,
}

struct Posted {
    requests: Vec<Handle>,
    to: usize,
    _header: Box<[u8; HEADER]>,
    _data: Vec<u8>,
}

// SAFETY: MPI was initialised for use from any thread, one at a time; `&mut self` sees to that.
#[allow(unsafe_code)]
unsafe impl Send for Mpi {}

/// True when an MPI launcher started this process.
pub fn launched() -> bool {
    ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"].iter().any(|name| std::env::var_os(name).is_some())
}

/// Names under which libmpi is looked for: the launcher's own kind first.
fn candidates() -> Vec<&'static str> {
    let open_mpi = ["libmpi.so.40", "libmpi.40.dylib"];
    let mpich = ["libmpich.so.12", "libmpi.so.12", "libmpi.12.dylib"];
    let mut names = vec![];
    if std::env::var_os("OMPI_COMM_WORLD_RANK").is_some() {
        names.extend(open_mpi);
        names.extend(mpich);
    } else {
        names.extend(mpich);
        names.extend(open_mpi);
    }
    names.extend(["libmpi.so", "libmpi.dylib"]);
    names
}

/// Joins the job.
///
/// # Errors
/// There is no libmpi, it is of an unknown kind, or it cannot be used from the engine's thread.
#[allow(unsafe_code)]
pub fn init() -> Result<Mpi, CommError> {
    let broken = |e: libloading::Error| CommError::setup(format!("this libmpi is incomplete: {e}"));
    // SAFETY: libmpi's initialisers are made to be run by loading it.
    let library = candidates().into_iter().find_map(|name| unsafe { Library::new(name) }.ok()).ok_or_else(|| {
        CommError::setup(
            "libmpi was not found; install Open MPI or MPICH (Debian: openmpi-bin or mpich), or use --transport tcp",
        )
    })?;
    let mut name = [0u8; MAX_PROCESSOR_NAME];
    // SAFETY: these symbols have these types in the MPI standard and in both ABIs; data symbols are only addressed.
    let mut mpi = unsafe {
        let (world, byte, status_ignore) = match library.get::<*mut c_void>(b"ompi_mpi_comm_world\0") {
            Ok(_) => {
                let address = |name: &[u8]| -> Result<Handle, CommError> {
                    let symbol: Symbol<'_, *mut c_void> = library.get(name).map_err(broken)?;
                    Ok(symbol.try_as_raw_ptr().map_or(0, |p| p as usize))
                };
                (address(b"ompi_mpi_comm_world\0")?, address(b"ompi_mpi_byte\0")?, std::ptr::null_mut())
            }
            // mpi.h of MPICH: MPI_COMM_WORLD, MPI_BYTE, MPI_STATUS_IGNORE.
            Err(_) => (0x4400_0000, 0x4c00_010d, std::ptr::without_provenance_mut(1)),
        };
        let init: Symbol<'_, unsafe extern "C" fn(*mut c_int, *mut *mut *mut c_char, c_int, *mut c_int) -> c_int> =
            library.get(b"MPI_Init_thread\0").map_err(broken)?;
        let of_world: [Symbol<'_, unsafe extern "C" fn(Handle, *mut c_int) -> c_int>; 2] =
            [library.get(b"MPI_Comm_rank\0").map_err(broken)?, library.get(b"MPI_Comm_size\0").map_err(broken)?];
        let get_processor_name: Symbol<'_, unsafe extern "C" fn(*mut c_char, *mut c_int) -> c_int> =
            library.get(b"MPI_Get_processor_name\0").map_err(broken)?;
        let functions = Functions {
            isend: *library.get(b"MPI_Isend\0").map_err(broken)?,
            irecv: *library.get(b"MPI_Irecv\0").map_err(broken)?,
            test: *library.get(b"MPI_Test\0").map_err(broken)?,
            finalize: *library.get(b"MPI_Finalize\0").map_err(broken)?,
            abort: *library.get(b"MPI_Abort\0").map_err(broken)?,
        };
        let mut provided = 0;
        init(std::ptr::null_mut(), std::ptr::null_mut(), THREAD_SERIALIZED, &mut provided);
        if provided < THREAD_SERIALIZED {
            return Err(CommError::setup(
                "this libmpi was built without support for threads (MPI_THREAD_SERIALIZED); install one that has it",
            ));
        }
        let [mut rank, mut size, mut length] = [0; 3];
        get_processor_name(name.as_mut_ptr().cast(), &mut length);
        of_world[0](world, &mut rank);
        of_world[1](world, &mut size);
        let (rank, size) = (rank.max(0) as usize, size.max(1) as usize);
        Mpi {
            functions,
            world,
            byte,
            status_ignore,
            rank,
            hosts: vec![String::new(); size],
            sent: vec![Counters::default(); size],
            received: vec![Counters::default(); size],
            posted: vec![],
            left: false,
            _library: library,
        }
    };
    mpi.exchange_hosts(&name)?;
    Ok(mpi)
}

impl Mpi {
    /// Every rank learns where the others run.
    fn exchange_hosts(&mut self, mine: &[u8; MAX_PROCESSOR_NAME]) -> Result<(), CommError> {
        let n = self.size();
        let wait = Wait { patience: Some(PATIENCE), doing: Doing::of("telling the host's name") };
        for step in 0..n {
            let (to, from) = ((self.rank + step) % n, (self.rank + n - step) % n);
            let mut name = *mine;
            if step > 0 {
                let recv = Some((from, Incoming::Exact(&mut name)));
                self.exchange(Channel::Data, Some((to, mine)), recv, wait)?;
            }
            let length = name.iter().position(|b| *b == 0).unwrap_or(name.len());
            self.hosts[from] = String::from_utf8_lossy(&name[..length]).into_owned();
        }
        Ok(())
    }

    /// Starts sending `data`, which must stay where it is until the request is done.
    #[allow(unsafe_code)]
    fn start_send(&self, to: usize, tag: Channel, data: &[u8]) -> Handle {
        let mut request = 0;
        // SAFETY: `exchange` does not return before the request is done, or keeps the data in `posted` until then; MPI
        // does not write to what it sends.
        unsafe {
            let data_ptr = data.as_ptr().cast_mut().cast();
            (self.functions.isend)(
                data_ptr,
                data.len() as c_int,
                self.byte,
                to as c_int,
                tag as c_int,
                self.world,
                &mut request,
            );
        }
        request
    }

    #[allow(unsafe_code)]
    fn start_receive(&self, from: usize, tag: Channel, into: &mut [u8]) -> Handle {
        let mut request = 0;
        let (length, into) = (into.len() as c_int, into.as_mut_ptr().cast());
        // SAFETY: `exchange` does not return before the request is done.
        unsafe {
            (self.functions.irecv)(into, length, self.byte, from as c_int, tag as c_int, self.world, &mut request);
        }
        request
    }

    #[allow(unsafe_code)]
    fn done(&self, request: &mut Handle) -> bool {
        let mut flag = 0;
        // SAFETY: the request was made by isend or irecv and has not been done yet.
        unsafe { (self.functions.test)(request, &mut flag, self.status_ignore) };
        flag != 0
    }

    /// Starts sending a command, and forgets those that have arrived.
    fn post(&mut self, to: usize, header: [u8; HEADER], data: &[u8]) {
        let mut posted = std::mem::take(&mut self.posted);
        posted.retain_mut(|message| {
            message.requests.retain_mut(|request| !self.done(request));
            !message.requests.is_empty()
        });
        let (header, data) = (Box::new(header), data.to_vec());
        let mut requests = vec![self.start_send(to, Channel::Command, &*header)];
        if !data.is_empty() {
            requests.push(self.start_send(to, Channel::Command, &data));
        }
        posted.push(Posted { requests, to, _header: header, _data: data });
        self.posted = posted;
    }

    /// Waits for requests to or from `rank`.
    fn wait_for(&self, requests: &mut Vec<Handle>, rank: usize, start: Instant, wait: Wait) {
        loop {
            requests.retain_mut(|request| !self.done(request));
            if requests.is_empty() {
                return;
            }
            let waited = start.elapsed();
            if wait.patience.is_some_and(|p| waited >= p) {
                let failure = Failure::Stalled { seconds: waited.as_secs_f64() };
                self.end_job(&CommError::by(rank, &self.host(rank), failure).while_doing(wait.doing).to_string());
            }
            match waited {
                waited if waited < SPIN => std::hint::spin_loop(),
                waited if waited < IDLE => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    }

    /// MPI counts in an int.
    fn check_length(&self, rank: usize, length: usize) -> Result<(), CommError> {
        if c_int::try_from(length).is_ok() {
            return Ok(());
        }
        let message = format!("a message of {length} bytes; MPI takes 2 GB at most");
        Err(CommError::by(rank, &self.hosts[rank], Failure::Protocol { message }))
    }

    #[allow(unsafe_code)]
    fn end_job(&self, message: &str) -> ! {
        tracing::error!("rank {}: {message}", self.rank);
        // SAFETY: MPI is initialised.
        unsafe { (self.functions.abort)(self.world, 1) };
        std::process::abort()
    }
}

impl Transport for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.hosts.len()
    }

    fn host(&self, rank: usize) -> String {
        self.hosts[rank].clone()
    }

    fn exchange(
        &mut self,
        channel: Channel,
        send: Option<(usize, &[u8])>,
        recv: Option<(usize, Incoming<'_>)>,
        wait: Wait,
    ) -> Result<(), CommError> {
        let start = Instant::now();
        let awaited = recv.as_ref().map(|(from, _)| *from).or(send.map(|(to, _)| to)).unwrap_or(self.rank);
        let mut requests = vec![];
        let out;
        if let Some((to, data)) = send {
            self.check_length(to, data.len())?;
            out = Header { channel, sequence: self.sent[to].next(channel), length: data.len() }.encode();
            if channel == Channel::Command {
                self.post(to, out, data);
            } else {
                requests.push(self.start_send(to, channel, &out));
                if !data.is_empty() {
                    requests.push(self.start_send(to, channel, data));
                }
            }
        }
        let mut result = Ok(());
        if let Some((from, mut into)) = recv {
            if let Incoming::Exact(into) = &into {
                self.check_length(from, into.len())?;
            }
            let mut header = [0; HEADER];
            let mut first = vec![self.start_receive(from, channel, &mut header)];
            let known = match &mut into {
                Incoming::Exact(into) if !into.is_empty() => {
                    requests.push(self.start_receive(from, channel, into));
                    true
                }
                Incoming::Exact(_) => true,
                Incoming::Any(_) => false,
            };
            self.wait_for(&mut first, from, start, wait);
            let checked = Header::decode(&header)
                .and_then(|header| self.received[from].check(&header).map(|()| header))
                .and_then(|header| into.room(header.length));
            match checked {
                Ok(room) if !known && !room.is_empty() => requests.push(self.start_receive(from, channel, room)),
                Ok(_) => {}
                // A message that was announced wrongly never ends: the job has to.
                Err(failure) if known && !requests.is_empty() => {
                    let error = CommError::by(from, &self.host(from), failure).while_doing(wait.doing);
                    self.end_job(&error.to_string());
                }
                Err(failure) => {
                    result = Err(CommError::by(from, &self.host(from), failure).while_doing(wait.doing));
                }
            }
        }
        self.wait_for(&mut requests, awaited, start, wait);
        result
    }

    fn abort(&mut self, message: &str) {
        self.end_job(message);
    }

    fn leave(&mut self) {
        self.left = true;
    }
}

impl Drop for Mpi {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if !self.left {
            self.end_job("this rank ended without leaving the group");
        }
        let wait = Wait { patience: Some(PATIENCE), doing: Doing::of("ending") };
        for mut message in std::mem::take(&mut self.posted) {
            self.wait_for(&mut message.requests, message.to, Instant::now(), wait);
        }
        // SAFETY: MPI is initialised, and every rank that leaves comes here.
        unsafe { (self.functions.finalize)() };
    }
}
