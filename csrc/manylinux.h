// What newer compilers' headers ask of the system, answered here or by the symbol of old, so that an extension built on
// a Linux of today loads on those of 2018 and later (manylinux_2_28). For the Python extension only: the C library asks
// for nothing of the kind.
#pragma once

#include <new>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GLIBCXX__)

extern "C" {

// glibc 2.32: whether reference counts may do without atomic operations. They may not: there is always PyTorch
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

// libstdc++ of GCC 11: two parts of what copying and destroying an exception_ptr have always done
void copy_exception_ptr(void* self, const void* other) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void destroy_exception_ptr(void* self) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");
__attribute__((visibility("hidden"))) void add_reference(void* const* self) __asm__(
    "_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
__attribute__((visibility("hidden"))) void release(void** self) __asm__(
    "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

void add_reference(void* const* self) {
  // the copy is never destroyed
  void* copy;
  copy_exception_ptr(&copy, self);
}

void release(void** self) {
  destroy_exception_ptr(self);
  *self = nullptr;
}

// libstdc++ of GCC 11
[[noreturn]] __attribute__((visibility("hidden"))) void throw_bad_array_new_length() __asm__(
    "_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }
}

#endif
