// Sharing work between OpenMP threads, and memory that a thread keeps between calls.
//
// Units are handed out one by one, so that a core busy elsewhere delays nothing but its own unit. No result may depend
// on which thread computes a unit.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace rekindle {

class Units {
 public:
  explicit Units(int64_t count) : count_(count) {}

  template <class Body>
  void work(const Body& body) {
    for (int64_t unit; (unit = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) body(unit);
  }

  // As `work`, but a thread takes each unit before it does the one before it: announce(unit) comes that much earlier
  // than body(unit).
  template <class Announce, class Body>
  void work_ahead(const Announce& announce, const Body& body) {
    const auto take = [&] {
      const int64_t unit = next_.fetch_add(1, std::memory_order_relaxed);
      if (unit < count_) announce(unit);
      return unit;
    };
    for (int64_t unit = take(); unit < count_;) {
      const int64_t next = take();
      body(unit);
      unit = next;
    }
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t count_;
};

template <class Body>
void for_each_unit(int num_threads, int64_t count, const Body& body) {
  if (num_threads <= 1 || count <= 1) {
    for (int64_t unit = 0; unit < count; ++unit) body(unit);
    return;
  }
  Units units(count);
#pragma omp parallel num_threads(num_threads)
  units.work(body);
}

// A block of memory that only grows; its contents are undefined after `reserve`.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  template <class T>
  T* reserve(size_t count) {
    const size_t bytes = (count * sizeof(T) + 63) & ~size_t{63};
    if (bytes > capacity_) {
      std::free(memory_);
      capacity_ = 0;
      memory_ = std::aligned_alloc(64, bytes);
      if (memory_ == nullptr) throw std::bad_alloc();
      capacity_ = bytes;
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace rekindle
