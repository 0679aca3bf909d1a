//! Connections: how they are named, made, secured and set up.

pub(crate) mod control;
pub(crate) mod data;
pub(crate) mod endpoint;
pub(crate) mod security;
pub(crate) mod tcp;
pub mod tls;
pub(crate) mod unix;
