//! Folders and files that are for their owner alone, in the terms of the system.

use std::fs::{File, Metadata, OpenOptions};
use std::io::Result;
use std::path::Path;

#[cfg(unix)]
mod of_system {
    use std::fs::{DirBuilder, Permissions};
    use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};

    use super::*;

    pub(crate) fn create_dir_all(path: &Path) -> Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)
    }

    pub(crate) fn make_private(path: &Path, meta: &Metadata) -> Result<()> {
        let mode = if meta.is_dir() { 0o700 } else { 0o600 };
        match meta.mode() & 0o777 & !mode {
            0 if meta.is_file() => Ok(()),
            _ => std::fs::set_permissions(path, Permissions::from_mode(mode)),
        }
    }

    pub(crate) fn create_new(path: &Path) -> Result<File> {
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
    }

    pub(crate) fn open_itself(path: &Path) -> Result<File> {
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)
    }

    pub(crate) fn is_own(meta: &Metadata) -> bool {
        meta.uid() == rustix::process::geteuid().as_raw()
    }
}

/// Folders of a user's profile are the user's alone by what they inherit; owners cannot be asked for without access lists.
#[cfg(not(unix))]
mod of_system {
    use super::*;

    pub(crate) fn create_dir_all(path: &Path) -> Result<()> {
        std::fs::create_dir_all(path)
    }

    pub(crate) fn make_private(_: &Path, _: &Metadata) -> Result<()> {
        Ok(())
    }

    pub(crate) fn create_new(path: &Path) -> Result<File> {
        OpenOptions::new().write(true).create_new(true).open(path)
    }

    pub(crate) fn open_itself(path: &Path) -> Result<File> {
        if !path.symlink_metadata()?.is_file() {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        File::open(path)
    }

    pub(crate) fn is_own(_: &Metadata) -> bool {
        true
    }
}

/// Makes a folder and those that it is in.
pub(crate) use of_system::create_dir_all;
/// Makes a file that is not there yet.
pub(crate) use of_system::create_new;
/// Whether this user owns it.
pub(crate) use of_system::is_own;
/// Takes a file or folder that is there from others.
pub(crate) use of_system::make_private;
/// Opens a file for reading, not what a link leads to, and without waiting for the other end of a pipe.
pub(crate) use of_system::open_itself;
