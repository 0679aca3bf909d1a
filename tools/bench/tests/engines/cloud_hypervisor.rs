//! Cloud Hypervisor.
