//! Linked devices.
