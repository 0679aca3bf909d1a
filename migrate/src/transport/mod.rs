//! Connections: how they are made and set up. TLS and Unix sockets are not here yet.

pub(crate) mod control;
pub(crate) mod tcp;
