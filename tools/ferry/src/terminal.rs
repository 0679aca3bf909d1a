//! Modes of the terminal that somebody types in, put back however the command ends.
//!
//! A signal that can't be caught is the one thing that leaves a terminal as it is; `reset` helps then.

use std::io::stdin;

use nix::sys::termios::{
    InputFlags, LocalFlags, SetArg, SpecialCharacterIndices, Termios, cfmakeraw, tcgetattr, tcsetattr,
};
use nix::unistd::{getpgrp, tcgetpgrp};

/// How what is typed is passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Every key as it is, Ctrl-C too.
    Raw,
    /// Every key at once, but Ctrl-C and Ctrl-Z are this process's.
    Keys,
}

/// A terminal in another mode, until this is dropped.
#[derive(Debug)]
pub(crate) struct Terminal(Termios);

impl Terminal {
    /// Puts the standard input into `mode`; `None` if it is no terminal, or another process is in its foreground.
    ///
    /// # Errors
    /// The terminal refuses.
    pub(crate) fn enter(mode: Mode) -> nix::Result<Option<Self>> {
        let Ok(before) = tcgetattr(stdin()) else { return Ok(None) };
        if tcgetpgrp(stdin()) != Ok(getpgrp()) {
            return Ok(None);
        }
        let mut wanted = before.clone();
        match mode {
            Mode::Raw => cfmakeraw(&mut wanted),
            Mode::Keys => {
                wanted.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
                wanted.input_flags.remove(InputFlags::ICRNL);
                wanted.control_chars[SpecialCharacterIndices::VMIN as usize] = 1;
                wanted.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;
            }
        }
        tcsetattr(stdin(), SetArg::TCSANOW, &wanted)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // What was typed and not read is thrown away: it was not meant for the shell. A terminal that has hung up has
        // no mode any more.
        let _ = tcsetattr(stdin(), SetArg::TCSAFLUSH, &self.0);
    }
}
