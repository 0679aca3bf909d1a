//! Connections: how they are named, made and set up. TLS is not here yet.

pub(crate) mod control;
pub(crate) mod endpoint;
pub(crate) mod tcp;
pub(crate) mod unix;
