//! The interface against hand-made virtqueues.
