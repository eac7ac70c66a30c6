//! A file that is read until its call is cancelled: a file may be longer than anybody waits for.

use std::{
    fs::File,
    io::{Error, Read, Result},
};

use tokio_util::sync::CancellationToken;

pub struct Stoppable<'a> {
    pub file: File,
    pub cancel: &'a CancellationToken,
}

impl Read for Stoppable<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        if self.cancel.is_cancelled() {
            return Err(Error::other("the call was cancelled"));
        }
        self.file.read(buffer)
    }
}
