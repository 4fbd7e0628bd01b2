//! The kernels' source, its compilation by NVRTC, and the cache of the result.

use std::ffi::{CString, c_char};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;

use cudarc::nvrtc::sys;

use crate::CudaError;
use crate::args::layouts;
use crate::preamble::preamble;

macro_rules! kernel_files {
    ($($name:literal),* $(,)?) => {
        /// Every file of the kernels, in the order in which they form one program.
        pub const KERNEL_FILES: &[(&str, &str)] = &[$(($name, include_str!(concat!("../kernels/", $name)))),*];
    };
}

kernel_files!(
    "common.cuh",
    "mma_rows.cuh",
    "elementwise.cu",
    "norm.cu",
    "silu_mul.cu",
    "all_reduce.cu",
    "linear_f32.cu",
    "linear_split.cu",
    "linear_mma.cu",
    "router_topk.cu",
    "moe_plan.cu",
    "moe_mma.cu",
    "moe_combine.cu",
    "rope.cu",
    "attention_f32.cu",
    "mla_attention.cu",
    "index_select.cu",
    "gemm_mma.cu",
    "gemm_wgmma.cu",
    "mla_prefill.cu",
    "repack.cu",
    "sample.cu",
);

/// The kernels as one program: what src/preamble.rs says first, and last the assertions that both sides lay arguments out
/// alike.
pub fn kernel_source() -> String {
    let (preamble, layouts) = (preamble(), layouts());
    let first = std::iter::once(("preamble.rs", preamble.as_str()));
    let last = std::iter::once(("args.rs", layouts.as_str()));
    let files = first.chain(KERNEL_FILES.iter().copied()).chain(last);
    files.map(|(name, text)| format!("#line 1 \"{name}\"\n{text}\n")).collect()
}

/// Machine code of the kernels for `arch` (such as `sm_90a`), from the cache or from NVRTC.
pub(crate) fn machine_code(arch: &str) -> Result<Vec<u8>, CudaError> {
    let source = kernel_source();
    let mut hash = DefaultHasher::new();
    (&source, arch, env!("CARGO_PKG_VERSION")).hash(&mut hash);
    let cached = cache_dir().map(|dir| dir.join(format!("{arch}-{:016x}.cubin", hash.finish())));
    if let Some(code) = cached.as_ref().and_then(|path| std::fs::read(path).ok()) {
        return Ok(code);
    }
    tracing::info!("compiling the CUDA kernels for {arch}");
    let code = compile(&source, arch)?;
    if let Some(path) = cached {
        // Written beside and renamed, so that another process never reads half a file; a failure costs a compilation.
        let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
        let written = path.parent().map_or(Ok(()), std::fs::create_dir_all);
        if let Err(e) =
            written.and_then(|()| std::fs::write(&temporary, &code)).and_then(|()| std::fs::rename(&temporary, &path))
        {
            tracing::debug!("the compiled kernels were not kept in {}: {e}", path.display());
        }
    }
    Ok(code)
}

fn cache_dir() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|home| home.join(".cache")));
    cache.map(|dir| dir.join("tandem/cuda"))
}

#[allow(unsafe_code)]
fn compile(source: &str, arch: &str) -> Result<Vec<u8>, CudaError> {
    let failed = |log: String| CudaError::Compile { arch: arch.to_string(), log };
    // SAFETY: looks for the library only.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoCompiler);
    }
    if let Some(newest) = supported_architectures().into_iter().max()
        && arch.trim_start_matches("sm_").trim_end_matches('a').parse().is_ok_and(|wanted: i32| wanted > newest)
    {
        return Err(CudaError::OldCompiler { arch: arch.to_string(), newest });
    }
    let text = CString::new(source).map_err(|e| failed(e.to_string()))?;
    // Generic lambdas count as host functions otherwise.
    let on_device = "--device-as-default-execution-space";
    let options = [&format!("--gpu-architecture={arch}"), "--std=c++17", "--define-macro=NDEBUG", on_device];
    let options: Vec<CString> = options.into_iter().filter_map(|o| CString::new(o).ok()).collect();
    let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
    let mut program = std::ptr::null_mut();
    // SAFETY: strings are terminated and outlive the calls; sizes come from NVRTC; the program is destroyed once.
    unsafe {
        let made = sys::nvrtcCreateProgram(
            &mut program,
            text.as_ptr(),
            c"kernels.cu".as_ptr(),
            0,
            std::ptr::null(),
            std::ptr::null(),
        );
        if made != sys::nvrtcResult::NVRTC_SUCCESS {
            return Err(failed(format!("{made:?}")));
        }
        let compiled = sys::nvrtcCompileProgram(program, pointers.len() as i32, pointers.as_ptr());
        let result = if compiled == sys::nvrtcResult::NVRTC_SUCCESS {
            let mut size = 0;
            sys::nvrtcGetCUBINSize(program, &mut size);
            let mut code = vec![0u8; size];
            sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast());
            Ok(code)
        } else {
            let mut size = 0;
            sys::nvrtcGetProgramLogSize(program, &mut size);
            let mut log = vec![0u8; size];
            sys::nvrtcGetProgramLog(program, log.as_mut_ptr().cast());
            Err(failed(String::from_utf8_lossy(&log).trim_end_matches('\0').to_string()))
        };
        sys::nvrtcDestroyProgram(&mut program);
        result
    }
}

/// Architectures that the compiler knows, as 10 times their compute capability; none if it does not say.
#[allow(unsafe_code)]
fn supported_architectures() -> Vec<i32> {
    let mut count = 0;
    // SAFETY: out-pointers are locals; the list has as many places as NVRTC said that it fills.
    unsafe {
        if sys::nvrtcGetNumSupportedArchs(&mut count) != sys::nvrtcResult::NVRTC_SUCCESS || count < 0 {
            return vec![];
        }
        let mut list = vec![0; count as usize];
        let found = sys::nvrtcGetSupportedArchs(list.as_mut_ptr());
        if found == sys::nvrtcResult::NVRTC_SUCCESS { list } else { vec![] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_compile_where_nvrtc_is() {
        // SAFETY: looks for the library only.
        #[allow(unsafe_code)]
        if !unsafe { sys::is_culib_present() } {
            eprintln!("skipped: no NVRTC here; .ci/run compiles the kernels with nvcc");
            return;
        }
        let code = compile(&kernel_source(), "sm_90a").expect("compiles");
        assert!(code.len() > 10_000);
        let later = compile(&kernel_source(), "sm_999").expect_err("no such architecture");
        assert!(matches!(later, CudaError::OldCompiler { .. }), "{later}");
    }
}
