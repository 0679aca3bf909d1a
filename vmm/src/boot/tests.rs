//! What can be loaded, and what can't and why.
