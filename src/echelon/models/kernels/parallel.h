// The threads of the caller's OpenMP library, without a word of OpenMP at compile time.
//
// Python passes the address of GOMP_parallel, which the libraries of GCC, LLVM and Intel all have, out of
// the one that torch uses: a second library in the process would have a pool of threads of its own.
#pragma once

#include <cstdint>
#include <cstdlib>

using Parallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

inline Parallel parallel = nullptr;  // null: everything on the calling thread

// Hands out 0, 1, ..., count - 1 to whichever threads ask.
class Turns {
  public:
    explicit Turns(int64_t count) : count_(count) {}
    bool take(int64_t& turn) { return (turn = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED)) < count_; }

  private:
    const int64_t count_;
    int64_t next_ = 0;
};

// Calls work() on each of the threads, of which there may be fewer than asked for.
template <class Work>
void on_threads(int threads, Work work) {
    if (threads < 2 || parallel == nullptr) return work();
    parallel([](void* data) { (*static_cast<Work*>(data))(); }, &work, static_cast<unsigned>(threads), 0);
}

// One thread's memory, aligned for any vector.
class Block {
  public:
    explicit Block(size_t size) : at_(static_cast<char*>(std::aligned_alloc(64, (size + 63) / 64 * 64))) {}
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    ~Block() { std::free(at_); }
    char* at() const { return at_; }

  private:
    char* const at_;
};
