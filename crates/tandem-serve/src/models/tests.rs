//! The pool with models that are numbers, on a clock that the test moves.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;

use super::keep_alive;
use super::pool::{KeepAlive, Launcher, Limits, Pool, Refusal, Spec, State};

const LOAD: Duration = Duration::from_secs(3);
const END: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(3600);

/// What happens in the pool, and what is to happen.
#[derive(Default)]
struct World {
    /// Bytes in memory now, and at most.
    bytes: AtomicU64,
    most: AtomicU64,
    /// Models in memory, and loads begun.
    events: Mutex<Vec<String>>,
    n_in_use_at_end: AtomicUsize,
    /// Loads of these fail.
    failing: Mutex<HashMap<String, String>>,
    /// Requests in flight by model.
    in_flight: Mutex<HashMap<String, usize>>,
    crash: Notify,
    /// Bytes that a model turns out to take.
    real: Mutex<HashMap<String, u64>>,
}

struct Fake(Arc<World>);

struct Running {
    name: String,
    bytes: u64,
    world: Arc<World>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.world.bytes.fetch_sub(self.bytes, Ordering::SeqCst);
    }
}

impl Launcher for Fake {
    type Running = Running;
    type Address = String;

    async fn load(&self, spec: &Spec) -> Result<(Running, String), String> {
        let world = &self.0;
        world.events.lock().unwrap().push(format!("load {}", spec.name));
        let bytes = *spec.bytes.as_ref().unwrap();
        let now = world.bytes.fetch_add(bytes, Ordering::SeqCst) + bytes;
        world.most.fetch_max(now, Ordering::SeqCst);
        let running = Running { name: spec.name.clone(), bytes, world: Arc::clone(world) };
        tokio::time::sleep(LOAD).await;
        match world.failing.lock().unwrap().get(&spec.name) {
            Some(why) => Err(why.clone()),
            None => Ok((running, format!("address of {}", spec.name))),
        }
    }

    fn bytes(&self, running: &Running) -> Option<u64> {
        self.0.real.lock().unwrap().get(&running.name).copied()
    }

    async fn ended(&self, running: &mut Running) -> String {
        self.0.crash.notified().await;
        format!("{} crashed", running.name)
    }

    async fn end(&self, running: Running) {
        tokio::time::sleep(END).await;
        let in_flight = self.0.in_flight.lock().unwrap().get(&running.name).copied().unwrap_or(0);
        self.0.n_in_use_at_end.fetch_add(in_flight, Ordering::SeqCst);
        self.0.events.lock().unwrap().push(format!("end {}", running.name));
    }
}

fn spec(name: &str, bytes: u64) -> Spec {
    Spec { name: name.into(), dir: PathBuf::from(name), bytes: Ok(bytes) }
}

fn limits(memory_bytes: u64, pinned: &[&str]) -> Limits {
    let pinned = pinned.iter().map(|name| (*name).to_owned()).collect();
    Limits { memory_bytes, keep_alive: KeepAlive::Forever, pinned }
}

fn pool(limits: Limits, specs: &[(&str, u64)]) -> (Arc<World>, Arc<Pool<Fake>>) {
    let world = Arc::new(World::default());
    let specs = specs.iter().map(|(name, bytes)| spec(name, *bytes)).collect();
    (Arc::clone(&world), Pool::new(Fake(world), limits, specs))
}

fn state(pool: &Pool<Fake>, name: &str) -> State {
    pool.list().into_iter().find(|model| model.name == name).expect(name).state
}

fn loads(world: &World) -> Vec<String> {
    let events = world.events.lock().unwrap();
    events.iter().filter_map(|event| event.strip_prefix("load ").map(str::to_owned)).collect()
}

/// A request: it waits, holds its model for a while, and knows that nobody ends it meanwhile.
async fn request(world: Arc<World>, pool: Arc<Pool<Fake>>, name: &'static str, takes: Duration) -> Result<(), Refusal> {
    let lease = pool.acquire(name, LONG).await?;
    assert_eq!(lease.address, format!("address of {name}"));
    *world.in_flight.lock().unwrap().entry(name.into()).or_default() += 1;
    tokio::time::sleep(takes).await;
    *world.in_flight.lock().unwrap().get_mut(name).unwrap() -= 1;
    drop(lease);
    Ok(())
}

async fn seconds(n: f64) {
    tokio::time::sleep(Duration::from_secs_f64(n)).await;
}

#[tokio::test(start_paused = true)]
async fn two_hundred_alternating_requests_within_memory_for_one() {
    let (world, pool) = pool(limits(10, &[]), &[("a", 8), ("b", 7)]);
    for i in 0..200 {
        let name = if i % 2 == 0 { "a" } else { "b" };
        request(Arc::clone(&world), Arc::clone(&pool), name, Duration::from_millis(50)).await.expect("answered");
    }
    assert_eq!(loads(&world).len(), 200);
    // All at once: each model's requests share its loads.
    world.events.lock().unwrap().clear();
    let all = (0..200).map(|i| {
        let name = ["a", "b"][i % 2];
        tokio::spawn(request(Arc::clone(&world), Arc::clone(&pool), name, Duration::from_millis(i as u64)))
    });
    for done in all.collect::<Vec<_>>() {
        done.await.expect("no panic").expect("answered");
    }
    assert_eq!(loads(&world), ["a", "b"]);
    assert!(world.most.load(Ordering::SeqCst) <= 10, "{:?}", world.most);
    assert_eq!(world.n_in_use_at_end.load(Ordering::SeqCst), 0, "an answer was cut");
    pool.end().await;
    assert_eq!(world.bytes.load(Ordering::SeqCst), 0, "memory was not given back");
}

#[tokio::test(start_paused = true)]
async fn the_least_recently_used_leaves_and_only_as_many_as_must() {
    let (world, pool) = pool(limits(10, &[]), &[("a", 3), ("b", 3), ("c", 3), ("d", 3), ("big", 9)]);
    let ask = |name| request(Arc::clone(&world), Arc::clone(&pool), name, Duration::from_millis(1));
    for name in ["a", "b", "c", "a"] {
        ask(name).await.expect("answered");
    }
    ask("d").await.expect("answered");
    let states = |names: [&str; 5]| names.map(|name| state(&pool, name));
    use State::{Loaded as In, Unloaded as Out};
    assert_eq!(states(["a", "b", "c", "d", "big"]), [In, Out, In, In, Out]);
    ask("big").await.expect("answered");
    assert_eq!(states(["a", "b", "c", "d", "big"]), [Out, Out, Out, Out, In]);
    ask("a").await.expect("answered");
    assert_eq!(states(["a", "b", "c", "d", "big"]), [In, Out, Out, Out, Out]);
    assert!(world.most.load(Ordering::SeqCst) <= 10);
}

#[tokio::test(start_paused = true)]
async fn a_pinned_model_is_loaded_at_once_and_never_leaves() {
    let (world, pool) = pool(limits(10, &["p"]), &[("a", 4), ("b", 4), ("big", 7), ("huge", 11), ("p", 5)]);
    assert!(!pool.is_ready());
    seconds(4.0).await;
    assert!(pool.is_ready());
    pool.keep_alive("p", KeepAlive::For(Duration::ZERO));
    for i in 0..50 {
        request(Arc::clone(&world), Arc::clone(&pool), ["a", "b"][i % 2], Duration::from_secs(1))
            .await
            .expect("answered");
        assert_eq!(state(&pool, "p"), State::Loaded);
    }
    for (name, says) in [("big", "pinned models leave it 5 MB"), ("huge", "all models together may have")] {
        match pool.acquire(name, LONG).await.err() {
            Some(Refusal::Failed(why, None)) => assert!(why.contains(&says.replace("5 MB", "0 MB")), "{why}"),
            other => panic!("{name}: {other:?}"),
        }
    }
    // It is loaded again if it crashes, and the others are told nothing.
    world.crash.notify_waiters();
    seconds(5.0).await;
    assert_eq!(state(&pool, "p"), State::Loaded);
}

#[tokio::test(start_paused = true)]
async fn an_answer_is_never_cut_and_a_busy_model_does_not_starve_others() {
    let (world, pool) = pool(limits(10, &[]), &[("a", 8), ("b", 8)]);
    let long = tokio::spawn(request(Arc::clone(&world), Arc::clone(&pool), "a", Duration::from_secs(100)));
    seconds(5.0).await;
    let other = tokio::spawn(request(Arc::clone(&world), Arc::clone(&pool), "b", Duration::from_secs(1)));
    seconds(1.0).await;
    // More for a: they come after b.
    let later = tokio::spawn(request(Arc::clone(&world), Arc::clone(&pool), "a", Duration::from_secs(1)));
    seconds(80.0).await;
    assert_eq!((state(&pool, "a"), state(&pool, "b")), (State::Loaded, State::Unloaded));
    assert!(!other.is_finished() && !later.is_finished());
    long.await.expect("no panic").expect("whole");
    other.await.expect("no panic").expect("answered");
    later.await.expect("no panic").expect("answered");
    assert_eq!(loads(&world), ["a", "b", "a"]);
    assert_eq!(world.n_in_use_at_end.load(Ordering::SeqCst), 0);
    // Who no longer wants b lets a go on.
    world.events.lock().unwrap().clear();
    let long = tokio::spawn(request(Arc::clone(&world), Arc::clone(&pool), "a", Duration::from_secs(100)));
    seconds(0.5).await;
    let other = tokio::spawn(request(Arc::clone(&world), Arc::clone(&pool), "b", Duration::from_secs(1)));
    seconds(0.5).await;
    let later = tokio::spawn(request(Arc::clone(&world), Arc::clone(&pool), "a", Duration::from_secs(1)));
    seconds(0.5).await;
    other.abort();
    seconds(2.0).await;
    assert!(later.is_finished(), "it waits for nobody");
    long.await.expect("no panic").expect("whole");
    assert!(loads(&world).is_empty());
}

#[tokio::test(start_paused = true)]
async fn requests_wait_as_long_as_they_are_asked_to() {
    let (world, pool) = pool(limits(10, &[]), &[("a", 8), ("b", 8)]);
    // None at all: the load begins all the same, so that the next request finds it.
    for (wait, is_there) in [(0.0, false), (1.0, false), (1.9, false), (0.2, true), (0.0, true)] {
        let found = pool.acquire("a", Duration::from_secs_f64(wait)).await.err();
        match found {
            None => assert!(is_there, "{wait}"),
            Some(Refusal::NotYet(seconds)) => assert!(!is_there && (1..=60).contains(&seconds), "{wait}: {seconds}"),
            other => panic!("{wait}: {other:?}"),
        }
    }
    assert_eq!(loads(&world), ["a"]);
    assert_eq!(pool.acquire("none", LONG).await.err(), Some(Refusal::Unknown));
    // A client that leaves while its model loads disturbs nobody.
    let leaves = tokio::spawn(request(Arc::clone(&world), Arc::clone(&pool), "b", Duration::from_secs(1)));
    seconds(1.0).await;
    leaves.abort();
    let stays = tokio::spawn(request(Arc::clone(&world), Arc::clone(&pool), "b", Duration::from_secs(1)));
    stays.await.expect("no panic").expect("answered");
    assert_eq!(loads(&world), ["a", "b"]);
    let shown = pool.list();
    assert!(shown.iter().all(|model| model.n_running == 0 && model.n_waiting == 0), "{shown:?}");
}

#[tokio::test(start_paused = true)]
async fn idle_models_leave_after_their_time() {
    for (keep, before, after) in [
        (KeepAlive::Forever, 1e6, State::Loaded),
        (KeepAlive::For(Duration::from_secs(300)), 299.0, State::Loaded),
        (KeepAlive::For(Duration::from_secs(300)), 302.0, State::Unloaded),
        (KeepAlive::For(Duration::ZERO), 1.0, State::Unloaded),
    ] {
        let (world, pool) = pool(Limits { keep_alive: keep, ..limits(10, &[]) }, &[("a", 8)]);
        request(Arc::clone(&world), Arc::clone(&pool), "a", Duration::from_secs(900)).await.expect("answered");
        seconds(before).await;
        assert_eq!(state(&pool, "a"), after, "{keep:?} after {before} s");
        // A request's own wish counts from then on.
        pool.keep_alive("a", KeepAlive::For(Duration::from_secs(10)));
        request(Arc::clone(&world), Arc::clone(&pool), "a", Duration::from_secs(1)).await.expect("answered");
        seconds(9.0).await;
        assert_eq!(state(&pool, "a"), State::Loaded);
        seconds(3.0).await;
        assert_eq!(state(&pool, "a"), State::Unloaded);
    }
    // One that was loaded for a request that is to come again waits for it.
    let (_, pool) = pool(Limits { keep_alive: KeepAlive::For(Duration::ZERO), ..limits(10, &[]) }, &[("a", 8)]);
    assert!(pool.acquire("a", Duration::ZERO).await.is_err());
    seconds(10.0).await;
    assert_eq!(state(&pool, "a"), State::Loaded);
    drop(pool.acquire("a", Duration::ZERO).await.unwrap_or_else(|refusal| panic!("{refusal:?}")));
    seconds(1.0).await;
    assert_eq!(state(&pool, "a"), State::Unloaded);
}

#[tokio::test(start_paused = true)]
async fn a_failing_load_leaves_the_others_well() {
    let (world, pool) = pool(limits(20, &[]), &[("a", 8), ("bad", 8)]);
    world.failing.lock().unwrap().insert("bad".into(), "no tensor".into());
    request(Arc::clone(&world), Arc::clone(&pool), "a", Duration::from_secs(1)).await.expect("answered");
    let held = pool.acquire("a", LONG).await.unwrap_or_else(|refusal| panic!("{refusal:?}"));
    let waiting: Vec<_> =
        (0..5).map(|_| tokio::spawn(request(Arc::clone(&world), Arc::clone(&pool), "bad", LONG))).collect();
    for request in waiting {
        match request.await.expect("no panic") {
            Err(Refusal::Failed(why, Some(1))) => assert_eq!(why, "no tensor"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((state(&pool, "bad"), state(&pool, "a")), (State::Failed, State::Loaded));
    assert_eq!(
        pool.list().iter().find(|model| model.name == "bad").and_then(|model| model.error.clone()),
        Some("no tensor".into())
    );
    // At once it is not tried again; later it is, and less and less often.
    let n = loads(&world).len();
    assert!(matches!(pool.acquire("bad", LONG).await.err(), Some(Refusal::Failed(_, Some(1)))));
    assert_eq!(loads(&world).len(), n);
    seconds(1.1).await;
    assert!(matches!(pool.acquire("bad", LONG).await.err(), Some(Refusal::Failed(_, Some(2)))));
    assert_eq!(loads(&world).len(), n + 1);
    // Mended, it comes back.
    world.failing.lock().unwrap().clear();
    seconds(2.1).await;
    request(Arc::clone(&world), Arc::clone(&pool), "bad", Duration::from_secs(1)).await.expect("answered");
    drop(held);
    // One that crashes takes no other along, and is loaded again for the next request.
    let n = loads(&world).len();
    world.crash.notify_one();
    seconds(1.0).await;
    let failed: Vec<State> = ["a", "bad"].map(|name| state(&pool, name)).into();
    assert_eq!(failed.iter().filter(|state| **state == State::Failed).count(), 1, "{failed:?}");
    for name in ["a", "bad"] {
        request(Arc::clone(&world), Arc::clone(&pool), name, Duration::from_secs(1)).await.expect("answered");
    }
    assert_eq!(loads(&world).len(), n + 1);
}

#[tokio::test(start_paused = true)]
async fn measured_memory_counts_more_than_what_was_expected() {
    let (world, pool) = pool(limits(10, &[]), &[("a", 4), ("b", 4)]);
    world.real.lock().unwrap().insert("a".into(), 7);
    for name in ["a", "b"] {
        request(Arc::clone(&world), Arc::clone(&pool), name, Duration::from_secs(1)).await.expect("answered");
    }
    assert_eq!((state(&pool, "a"), state(&pool, "b")), (State::Unloaded, State::Loaded));
    // One that grows makes an idle one leave.
    world.real.lock().unwrap().insert("a".into(), 4);
    let (world, pool) = self::pool(limits(10, &[]), &[("a", 4), ("b", 4)]);
    let held = pool.acquire("a", LONG).await.unwrap_or_else(|refusal| panic!("{refusal:?}"));
    request(Arc::clone(&world), Arc::clone(&pool), "b", Duration::from_secs(1)).await.expect("answered");
    world.real.lock().unwrap().insert("a".into(), 9);
    seconds(2.0).await;
    assert_eq!((state(&pool, "a"), state(&pool, "b")), (State::Loaded, State::Unloaded));
    assert_eq!(pool.memory(), (10, 9));
    drop(held);
    seconds(2.0).await;
    assert_eq!(state(&pool, "a"), State::Loaded, "the last one stays");
}

/// A load's passing needs are gone once it is done, and come again with the next load.
#[tokio::test(start_paused = true)]
async fn a_load_needs_what_was_expected_even_if_the_model_then_takes_less() {
    for (budget, n_loads) in [(9, 6), (10, 2)] {
        let (world, pool) = pool(limits(budget, &[]), &[("a", 8), ("b", 8)]);
        for name in ["a", "b"] {
            world.real.lock().unwrap().insert(name.into(), 2);
        }
        for name in ["a", "b", "a", "b", "a", "b"] {
            request(Arc::clone(&world), Arc::clone(&pool), name, Duration::from_secs(1)).await.expect("answered");
            assert!(pool.memory().1 <= budget);
        }
        assert_eq!(loads(&world).len(), n_loads, "{budget}");
    }
}

#[tokio::test(start_paused = true)]
async fn models_come_and_go_in_the_folder() {
    let (world, pool) = pool(limits(10, &[]), &[("a", 4), ("b", 4)]);
    request(Arc::clone(&world), Arc::clone(&pool), "a", Duration::from_secs(1)).await.expect("answered");
    pool.update(vec![spec("c", 4), Spec { bytes: Err("broken".into()), ..spec("d", 0) }]);
    let shown: Vec<(String, bool)> = pool.list().into_iter().map(|model| (model.name, model.error.is_some())).collect();
    let expected = [("a", false), ("b", true), ("c", false), ("d", true)].map(|(name, error)| (name.to_owned(), error));
    assert_eq!(shown, expected);
    for (name, works) in [("a", true), ("b", false), ("c", true), ("d", false)] {
        assert_eq!(pool.acquire(name, LONG).await.is_ok(), works, "{name}");
    }
    pool.update(vec![spec("b", 4), spec("d", 4)]);
    for name in ["b", "d"] {
        assert!(pool.acquire(name, LONG).await.is_ok(), "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_server_is_the_end_of_all() {
    let (world, pool) = pool(limits(20, &[]), &[("a", 8), ("b", 8), ("c", 8)]);
    request(Arc::clone(&world), Arc::clone(&pool), "a", Duration::from_secs(1)).await.expect("answered");
    let waiting: Vec<_> =
        ["b", "c"].map(|name| tokio::spawn(request(Arc::clone(&world), Arc::clone(&pool), name, LONG))).into();
    seconds(1.0).await;
    pool.end().await;
    for request in waiting {
        assert_eq!(request.await.expect("no panic").err(), Some(Refusal::Ending));
    }
    assert_eq!(world.bytes.load(Ordering::SeqCst), 0);
    assert_eq!(pool.acquire("a", LONG).await.err(), Some(Refusal::Ending));
}

/// Requests of many kinds over many models: all are answered, within the memory, and nobody is cut off.
#[tokio::test(start_paused = true)]
async fn storms() {
    for seed in 0..20u64 {
        let (world, pool) = pool(
            Limits { keep_alive: KeepAlive::For(Duration::from_secs(seed % 7)), ..limits(20, &["a"]) },
            &[("a", 5), ("b", 6), ("c", 7), ("d", 8), ("e", 15)],
        );
        let mut state = seed * 7919 + 1;
        let mut random = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        let mut tasks = vec![];
        for _ in 0..200 {
            let name = ["a", "b", "c", "d", "e"][random(5) as usize];
            let takes = Duration::from_millis(random(4000));
            let task = tokio::spawn(request(Arc::clone(&world), Arc::clone(&pool), name, takes));
            if random(5) == 0 {
                tokio::time::sleep(Duration::from_millis(random(3000))).await;
                // The client leaves; a request that holds its model counts itself out first.
                if world.in_flight.lock().unwrap().values().all(|n| *n == 0) {
                    task.abort();
                }
            } else {
                tasks.push(task);
            }
            tokio::time::sleep(Duration::from_millis(random(200))).await;
        }
        for task in tasks {
            task.await.expect("no panic").unwrap_or_else(|refusal| panic!("seed {seed}: {refusal:?}"));
        }
        assert!(world.most.load(Ordering::SeqCst) <= 20, "seed {seed}: {:?}", world.most);
        assert_eq!(world.n_in_use_at_end.load(Ordering::SeqCst), 0, "seed {seed}: an answer was cut");
        pool.end().await;
        assert_eq!(world.bytes.load(Ordering::SeqCst), 0, "seed {seed}");
    }
}

#[test]
fn ollamas_words_for_how_long() {
    let seconds = |n: f64| Some(KeepAlive::For(Duration::from_secs_f64(n)));
    for (text, expected) in [
        ("5m", seconds(300.0)),
        ("90s", seconds(90.0)),
        ("1h30m", seconds(5400.0)),
        ("1.5h", seconds(5400.0)),
        ("300ms", seconds(0.3)),
        ("3600", seconds(3600.0)),
        ("0", seconds(0.0)),
        ("-0", seconds(0.0)),
        ("-1", Some(KeepAlive::Forever)),
        ("-1m", Some(KeepAlive::Forever)),
        ("1e30h", None),
        ("99999999999999999999999999h", Some(KeepAlive::Forever)),
        ("", None),
        ("-", None),
        ("m", None),
        ("5 m", None),
        ("5m3", None),
        ("5d", None),
        ("nan", None),
        ("soon", None),
    ] {
        assert_eq!(keep_alive(text).ok(), expected, "{text:?}");
    }
}

#[test]
fn models_get_the_flags_that_are_not_the_servers() {
    for (given, expected) in [
        ("serve --models-dir DIR", "serve"),
        ("-v serve --models-dir=DIR --context 8k --port 8000 --max-batch=4", "-v serve --context 8k --max-batch=4"),
        ("serve --pin a --pin=b --keep-alive -1 --load-timeout 5 --models-memory 3GB --ranks 2", "serve --ranks 2"),
        (
            "--config-file x serve --host 0.0.0.0 --api-key-file k --cors-origin * --end-with-stdin --lock",
            "--config-file x serve --lock",
        ),
        ("serve --cache-dir c --cache-dir-gb 3 --allowed-host=h", "serve --cache-dir-gb 3"),
        ("serve --port", "serve"),
    ] {
        let kept = super::arguments_of_model(given.split(' ').map(Into::into));
        let kept: Vec<String> = kept.into_iter().map(|word| word.into_string().unwrap()).collect();
        assert_eq!(kept.join(" "), expected, "{given}");
    }
}
