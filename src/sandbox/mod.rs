//! A loopback WhatsApp for the demo, the tests and the benches.
