//! The heap of a static binary.
#![allow(unsafe_code, reason = "the interface of allocators is unsafe")]

use std::alloc::{GlobalAlloc, Layout};

use dlmalloc::Dlmalloc;
use spin::Yield;
use spin::mutex::SpinMutex;

/// Bytes that are asked of the kernel at once: what a call needs, in one piece.
const PIECE: usize = 256 * 1024;

/// dlmalloc behind a lock that is cheap to take where nobody else wants it: calls have one thread at work nearly
/// all of the time. With the crate's own, which is musl's `pthread_mutex_lock(3)`, locking takes as long as all
/// that is locked.
pub struct Heap(SpinMutex<Dlmalloc, Yield>);

impl Heap {
    pub const fn new() -> Self {
        let mut heap = Dlmalloc::new();
        assert!(heap.set_granularity(PIECE));
        Self(SpinMutex::new(heap))
    }
}

// SAFETY: memory comes from dlmalloc alone, which hands none out twice, aligned as asked for, and is called by
// one thread at a time. What its functions want of their callers is what those of the trait want of theirs.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { self.0.lock().malloc(layout.size(), layout.align()) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { self.0.lock().calloc(layout.size(), layout.align()) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { self.0.lock().free(memory, layout.size(), layout.align()) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        unsafe { self.0.lock().realloc(memory, layout.size(), layout.align(), size) }
    }
}
