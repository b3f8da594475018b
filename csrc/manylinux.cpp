// Keeps the library loadable where torch's own wheels are: glibc 2.28 and the libstdc++ of GCC 8 (manylinux_2_28), also
// when a newer compiler and a newer glibc make it. tests/test_library.py names what is missing here when a kernel calls
// something newer.
#if defined(__x86_64__) && defined(__linux__)

#include <new>
#include <sstream>

// ---- glibc ---------------------------------------------------------------------------------------------------------
// glibc 2.34 moved the functions below from libdl, libpthread and librt into libc and gave them a second, newer symbol
// version, which the linker prefers; 2.35 did so with hypot, whose old version sets errno beside. The old version is
// still there and is the same function, with the same results. For each line here
// setup.py passes --wrap=<name> to the linker, so that every call, the CUDA runtime's too, goes to __wrap_<name>, which
// jumps to the old version.

// clang-format off
#define INPAINT_OLD_SYMBOL(name, version)                         \
  __asm__(".symver inpaint_old_" #name "," #name "@" version "\n" \
          ".pushsection .text\n"                                  \
          ".globl __wrap_" #name "\n"                             \
          ".hidden __wrap_" #name "\n"                            \
          ".type __wrap_" #name ", @function\n"                   \
          "__wrap_" #name ": jmp inpaint_old_" #name "@PLT\n"     \
          ".popsection\n")
// clang-format on

INPAINT_OLD_SYMBOL(dlclose, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(dlerror, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(dlmopen, "GLIBC_2.3.4");
INPAINT_OLD_SYMBOL(dlopen, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(dlsym, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(dlvsym, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(hypot, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_condattr_setpshared, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_create, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_detach, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_getspecific, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_join, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_key_create, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_key_delete, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_kill, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_mutex_trylock, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_mutexattr_destroy, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_mutexattr_init, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_mutexattr_setpshared, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_mutexattr_settype, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_once, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_rwlock_destroy, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_rwlock_init, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_rwlock_rdlock, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_rwlock_timedrdlock, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_rwlock_timedwrlock, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_rwlock_tryrdlock, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_rwlock_trywrlock, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_rwlock_unlock, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_rwlock_wrlock, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_rwlockattr_destroy, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_rwlockattr_init, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_rwlockattr_setpshared, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_setspecific, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_spin_destroy, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_spin_init, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_spin_lock, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_spin_trylock, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(pthread_spin_unlock, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(sem_destroy, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(sem_init, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(sem_post, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(sem_timedwait, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(sem_trywait, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(sem_wait, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(shm_open, "GLIBC_2.2.5");
INPAINT_OLD_SYMBOL(shm_unlink, "GLIBC_2.2.5");

// libstdc++ asks this variable of glibc 2.32 whether it can do without atomic instructions. Never, in a library that is
// called from many threads; our own copy says so to every file that is linked with this one.
extern "C" {
extern char __libc_single_threaded;
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// ---- libstdc++ -----------------------------------------------------------------------------------------------------
// Functions that it has since GCC 9 and GCC 11. Without these definitions the linker would take them from torch's
// libraries, which happen to have them today.

namespace std {
[[noreturn]] void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();

#endif
