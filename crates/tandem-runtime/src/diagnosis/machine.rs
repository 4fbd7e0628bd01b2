//! What a doctor finds on this machine: processor, cores, memory, devices. What is seen and what follows from it are apart,
//! so that tests can show a doctor any machine.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use tandem_cpu::bandwidth::measure_read_bandwidth;
use tandem_cpu::{Isa, Pool, process, system};

use super::finding::{Finding, Level};
use crate::units::bytes;

/// Read for the bandwidth.
const BANDWIDTH_BYTES: usize = 512 << 20;
/// For which other programs are watched.
const WATCHED: Duration = Duration::from_millis(300);

/// What is seen of a machine.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Kernels that this build has for the processor, slowest first.
    pub isas: Vec<Isa>,
    /// Kernels that are used.
    pub isa: Isa,
    /// The processor multiplies pairs of bf16.
    pub has_bf16: bool,
    /// The processor has integer dot products.
    pub has_vnni: bool,
    /// Threads that compute.
    pub threads: usize,
    /// Cores that this process may use.
    pub cores: usize,
    /// Cores of a quota.
    pub quota: Option<f64>,
    /// Memory nodes with processors.
    pub numa_nodes: usize,
    /// Names of the governors of the cores' clocks.
    pub governors: BTreeSet<String>,
    /// Runnable programs of the last minute, of the whole machine.
    pub load: Option<f64>,
    /// Share of the time in which other programs had the cores, while this one wanted all of them.
    pub taken: f64,
    /// Memory, and what of it can be had.
    pub memory: Option<(u64, u64)>,
    /// What a control group allows.
    pub memory_limit: Option<process::MemoryLimit>,
    /// Space for memory on a disk, and how much is in use.
    pub swap: Option<(u64, u64)>,
    /// `always`, `madvise` or `never`.
    pub huge_pages: Option<String>,
    /// Memory that may be pinned; `None` without a limit.
    pub lockable: Option<u64>,
    /// What a Mac lets its GPU keep.
    pub wired_limit: Option<u64>,
    /// Bytes per second that the threads read together.
    pub bandwidth: f64,
}

impl Machine {
    /// Looks at this one with so many threads; it takes a few seconds.
    pub fn look(threads: Option<usize>, isa: Option<Isa>) -> Machine {
        let threads = threads.unwrap_or_else(system::default_threads).max(1);
        let isa = isa.unwrap_or_else(Isa::detect);
        Machine {
            isas: Isa::available(),
            isa,
            has_bf16: isa.has_bf16(),
            has_vnni: isa.has_vnni(),
            threads,
            cores: system::default_threads(),
            quota: process::cpu_quota(),
            numa_nodes: numa_nodes(),
            governors: governors(),
            load: load(),
            taken: taken(threads.min(system::default_threads())),
            memory: meminfo("MemTotal:").zip(system::available_memory_bytes()),
            memory_limit: process::memory_limit(),
            swap: meminfo("SwapTotal:").zip(meminfo("SwapFree:")).map(|(all, free)| (all, all.saturating_sub(free))),
            huge_pages: huge_pages(),
            lockable: process::lockable_bytes(),
            wired_limit: system::wired_limit_bytes(),
            bandwidth: measure_read_bandwidth(&Pool::new(threads), BANDWIDTH_BYTES),
        }
    }

    /// What follows; `weight_bytes` are those of the model that is asked about.
    pub fn findings(&self, weight_bytes: Option<u64>) -> Vec<Finding> {
        let mut found = vec![self.kernels(), self.cores_used(), self.contention()];
        found.extend(self.governor());
        found.extend(self.numa());
        found.extend(self.memory());
        found.extend(self.swapping());
        found.push(self.locking(weight_bytes));
        found.extend(self.wired(weight_bytes));
        found.extend(self.paging());
        let evidence = format!("{:.1} GB/s read by {} threads", self.bandwidth / 1e9, self.threads);
        found.push(Finding::new("memory.bandwidth", Level::Ok, "bandwidth of memory", evidence));
        found
    }

    fn kernels(&self) -> Finding {
        let has = |yes: bool, name: &str| if yes { name.to_string() } else { format!("no {name}") };
        let features =
            format!("{}, {}", has(self.has_bf16, "bf16 products"), has(self.has_vnni, "integer dot products"));
        let evidence = format!("{} kernels; {features}", self.isa);
        let found = Finding::new("processor.kernels", Level::Ok, format!("kernels for {}", self.isa), evidence);
        let best = self.isas.last().copied().unwrap_or(Isa::Scalar);
        match self.isa {
            isa if isa != best => found
                .with_level(Level::Warning, format!("{isa} kernels on a processor that has {best}"))
                .with_remedy("leave --isa out"),
            Isa::Scalar => found
                .with_level(Level::Problem, "no vector kernels for this processor")
                .with_remedy("a processor with AVX2, AVX-512 or NEON: plain code is ten times slower and more"),
            Isa::Avx2 => found.with_level(Level::Warning, "no AVX-512 with VNNI and VBMI").with_remedy(
                "decoding hardly suffers; prompts ran at 237 instead of 494 tokens/s through a GLM layer on one \
                     machine. In a virtual machine, let it show the host's features",
            ),
            Isa::Avx512 if !self.has_bf16 => found
                .with_level(Level::Ok, "AVX-512 without bf16 products")
                .with_evidence("avx512 kernels; bf16 and fp8 weights are multiplied in single precision"),
            _ => found,
        }
    }

    fn cores_used(&self) -> Finding {
        let usable = self.quota.map_or(self.cores as f64, |quota| quota.min(self.cores as f64));
        let quota = self.quota.map_or(String::new(), |quota| format!(", a quota leaves {quota:.1} of them"));
        let evidence = format!("{} threads, {} cores{quota}", self.threads, self.cores);
        let found = Finding::new("processor.threads", Level::Ok, "threads and cores", evidence);
        if self.threads as f64 > usable.ceil() {
            found.with_level(Level::Problem, "more threads than cores").with_remedy(
                "leave --threads out: threads that wait for a core hold up all others at the end of every operation",
            )
        } else if self.threads < self.cores {
            found
                .with_level(Level::Warning, "fewer threads than cores")
                .with_remedy("leave --threads out to use every core")
        } else if self.quota.is_some_and(|quota| quota.fract() > 0.05) {
            found
                .with_level(Level::Warning, "a quota that is no whole number of cores")
                .with_remedy("the quota stops all threads for the rest of its period: make it a whole number of cores")
        } else {
            found
        }
    }

    fn contention(&self) -> Finding {
        let load =
            self.load.map_or(String::new(), |load| format!("; {load:.1} programs were runnable in the last minute"));
        let evidence =
            format!("others had the cores {:.0} % of {:.1} s{load}", 100.0 * self.taken, WATCHED.as_secs_f64());
        let found = Finding::new("processor.contention", Level::Ok, "the cores are free", evidence);
        match self.taken {
            share if share > 0.25 => found
                .with_level(Level::Problem, "other programs take the cores")
                .with_remedy("stop them: a step waits for its slowest thread, so one busy core costs as much as all"),
            share if share > 0.05 => found
                .with_level(Level::Warning, "other programs take some of the cores")
                .with_remedy("stop them, or leave them a core with --threads"),
            _ => found,
        }
    }

    fn governor(&self) -> Option<Finding> {
        let list = self.governors.iter().cloned().collect::<Vec<_>>().join(", ");
        let slow = self.governors.iter().any(|governor| matches!(governor.as_str(), "powersave" | "conservative"));
        let found = Finding::new("processor.governor", Level::Ok, "governor of the clock", list);
        match (self.governors.is_empty(), slow) {
            (true, _) => None,
            (false, false) => Some(found),
            (false, true) => {
                Some(found.with_level(Level::Warning, "the clock saves power").with_remedy(
                    "cpupower frequency-set -g performance (with the intel_pstate driver powersave is fine)",
                ))
            }
        }
    }

    fn numa(&self) -> Option<Finding> {
        let evidence = format!("{} memory nodes", self.numa_nodes);
        let found = Finding::new("processor.memory_nodes", Level::Warning, "several memory nodes", evidence);
        let remedy =
            "run a rank on each (--tp, with numactl --cpunodebind and --membind), so that threads read near memory";
        (self.numa_nodes > 1).then(|| found.with_remedy(remedy))
    }

    fn memory(&self) -> Option<Finding> {
        let (all, free) = self.memory?;
        let limit = self.memory_limit;
        let limited =
            limit.map_or(String::new(), |limit| format!("; a control group allows {}", bytes(limit.limit_bytes)));
        let evidence = format!("{} of {} can be had{limited}", bytes(free), bytes(all));
        Some(Finding::new("memory.available", Level::Ok, "memory", evidence))
    }

    fn swapping(&self) -> Option<Finding> {
        let (all, used) = self.swap?;
        let evidence = format!("{} of {} in use", bytes(used), bytes(all));
        let found = Finding::new("memory.swap", Level::Ok, "swap", evidence);
        Some(match used as f64 > 0.1 * all as f64 && used > 256 << 20 {
            true => found
                .with_level(Level::Warning, "memory has been swapped out")
                .with_remedy("close what took the memory, or pin the weights with --lock"),
            false => found,
        })
    }

    fn locking(&self, weight_bytes: Option<u64>) -> Finding {
        let Some(limit) = self.lockable else {
            return Finding::new(
                "memory.locked",
                Level::Ok,
                "weights can be pinned (--lock)",
                "no limit on locked memory",
            );
        };
        let evidence = format!("ulimit -l allows {}", bytes(limit));
        let found = Finding::new("memory.locked", Level::Ok, "weights can be pinned (--lock)", evidence);
        // Without a model any limit below a gigabyte is too small for one.
        let needed = weight_bytes.unwrap_or(1 << 30);
        match limit < needed {
            false => found,
            true => found.with_level(Level::Warning, "--lock cannot pin the weights").with_remedy(
                "ulimit -l unlimited, `memlock` in /etc/security/limits.conf, or LimitMEMLOCK=infinity of a service",
            ),
        }
    }

    /// What a Mac lets its GPU keep in memory.
    fn wired(&self, weight_bytes: Option<u64>) -> Option<Finding> {
        let limit = self.wired_limit?;
        let found = Finding::new("memory.wired", Level::Ok, "memory that the GPU may keep", bytes(limit));
        let needed = weight_bytes.unwrap_or(0) + (weight_bytes.unwrap_or(0) >> 4);
        let megabytes = needed >> 20;
        Some(match needed > limit {
            false => found,
            true => found
                .with_level(Level::Warning, "the GPU may not keep the weights in memory")
                .with_remedy(format!("sudo sysctl iogpu.wired_limit_mb={megabytes}, or --backend cpu")),
        })
    }

    fn paging(&self) -> Option<Finding> {
        let setting = self.huge_pages.clone()?;
        let found = Finding::new("memory.huge_pages", Level::Ok, "transparent huge pages", setting.clone());
        Some(match setting.as_str() {
            "never" => found.with_level(Level::Warning, "no transparent huge pages").with_remedy(
                "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: small pages cost a few per cent",
            ),
            _ => found,
        })
    }
}

fn numa_nodes() -> usize {
    let Ok(nodes) = std::fs::read_dir("/sys/devices/system/node") else { return 1 };
    let has_processors = |node: &std::fs::DirEntry| {
        node.file_name().to_str().is_some_and(|name| name.starts_with("node"))
            && std::fs::read_to_string(node.path().join("cpulist")).is_ok_and(|list| !list.trim().is_empty())
    };
    nodes.flatten().filter(has_processors).count().max(1)
}

fn governors() -> BTreeSet<String> {
    let Ok(cpus) = std::fs::read_dir("/sys/devices/system/cpu") else { return BTreeSet::new() };
    let governor = |cpu: std::fs::DirEntry| std::fs::read_to_string(cpu.path().join("cpufreq/scaling_governor")).ok();
    cpus.flatten().filter_map(governor).map(|text| text.trim().to_string()).collect()
}

fn load() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()
}

fn meminfo(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}

fn huge_pages() -> Option<String> {
    let text = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    Some(text.split_once('[')?.1.split_once(']')?.0.to_string())
}

/// Share of the time in which `threads` threads of this process that want to run have no core.
fn taken(threads: usize) -> f64 {
    std::thread::scope(|scope| {
        let spin = || {
            let start = Instant::now();
            while start.elapsed() < WATCHED {
                std::hint::spin_loop();
            }
            process::own_run_delay()
        };
        let spinning: Vec<_> = (0..threads).map(|_| scope.spawn(spin)).collect();
        let delays: Duration = spinning.into_iter().map(|thread| thread.join().unwrap_or_default()).sum();
        (delays.as_secs_f64() / threads as f64 / WATCHED.as_secs_f64()).min(1.0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn healthy() -> Machine {
        Machine {
            isas: vec![Isa::Scalar, Isa::Avx2, Isa::Avx512],
            isa: Isa::Avx512,
            has_bf16: true,
            has_vnni: true,
            threads: 4,
            cores: 4,
            quota: None,
            numa_nodes: 1,
            governors: BTreeSet::new(),
            load: Some(0.1),
            taken: 0.0,
            memory: Some((64 << 30, 60 << 30)),
            memory_limit: None,
            swap: Some((0, 0)),
            huge_pages: Some("madvise".into()),
            lockable: None,
            wired_limit: None,
            bandwidth: 4e10,
        }
    }

    /// Identity and level of what is not well.
    fn faults(machine: &Machine) -> Vec<(&'static str, Level)> {
        let found = machine.findings(Some(8 << 30));
        found.into_iter().filter(|f| f.level > Level::Ok).map(|f| (f.id, f.level)).collect()
    }

    #[test]
    fn each_fault_of_a_machine_is_found_and_no_other() {
        type Change = fn(&mut Machine);
        let cases: [(&str, Level, Change); 14] = [
            ("memory.wired", Level::Warning, |m| m.wired_limit = Some(6 << 30)),
            ("processor.kernels", Level::Warning, |m| (m.isas, m.isa) = (vec![Isa::Scalar, Isa::Avx2], Isa::Avx2)),
            ("processor.kernels", Level::Warning, |m| m.isa = Isa::Avx2),
            ("processor.kernels", Level::Problem, |m| (m.isas, m.isa) = (vec![Isa::Scalar], Isa::Scalar)),
            ("processor.threads", Level::Problem, |m| m.threads = 9),
            ("processor.threads", Level::Problem, |m| m.quota = Some(1.5)),
            ("processor.threads", Level::Warning, |m| m.threads = 2),
            ("processor.contention", Level::Problem, |m| m.taken = 0.5),
            ("processor.contention", Level::Warning, |m| m.taken = 0.1),
            ("processor.governor", Level::Warning, |m| m.governors = ["powersave".to_string()].into()),
            ("processor.memory_nodes", Level::Warning, |m| m.numa_nodes = 2),
            ("memory.swap", Level::Warning, |m| m.swap = Some((8 << 30, 4 << 30))),
            ("memory.locked", Level::Warning, |m| m.lockable = Some(8 << 20)),
            ("memory.huge_pages", Level::Warning, |m| m.huge_pages = Some("never".into())),
        ];
        assert!(faults(&healthy()).is_empty());
        for (id, level, change) in cases {
            let mut machine = healthy();
            change(&mut machine);
            assert_eq!(faults(&machine), [(id, level)]);
            let found = machine.findings(Some(8 << 30));
            assert!(found.iter().all(|f| (f.level == Level::Ok) == f.remedy.is_none()), "{found:?}");
        }
    }
}
