//! The heap of a static binary.
#![allow(unsafe_code, reason = "the interface of allocators is unsafe")]

use std::alloc::{GlobalAlloc, Layout};
use std::sync::{Mutex, MutexGuard, PoisonError};

use dlmalloc::Dlmalloc;

/// Bytes that are asked of the kernel at once: what a call needs, in one piece.
const PIECE: usize = 256 * 1024;

/// dlmalloc behind a lock of the standard library. The crate's own global allocator has one of
/// `pthread_mutex_lock(3)`, and to lock and unlock that takes musl as long as to allocate and free: a seventh of
/// a call's instructions.
pub struct Heap(Mutex<Dlmalloc>);

impl Heap {
    pub const fn new() -> Self {
        let mut heap = Dlmalloc::new();
        assert!(heap.set_granularity(PIECE));
        Self(Mutex::new(heap))
    }

    fn lock(&self) -> MutexGuard<'_, Dlmalloc> {
        // A panic ends the process, and locking allocates nothing.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// SAFETY: memory comes from dlmalloc alone, which hands none out twice, aligned as asked for, and is called by
// one thread at a time. What its functions want of their callers is what those of the trait want of theirs.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { self.lock().malloc(layout.size(), layout.align()) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { self.lock().calloc(layout.size(), layout.align()) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { self.lock().free(memory, layout.size(), layout.align()) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        unsafe { self.lock().realloc(memory, layout.size(), layout.align(), size) }
    }
}
