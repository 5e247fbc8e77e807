// Threads that wait on a condition variable, never in a loop: on shared cores a spinning barrier costs more than the
// work.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace spatialprobe {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // the calling thread counts as one of them
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls task(index, worker) for every index in [0, count), in no particular order, and returns when all are done;
  // worker is in [0, threads()). Rethrows the first exception a task threw.
  void for_each(std::int64_t count, const std::function<void(std::int64_t, int)>& task);

  // Calls task(begin, end, worker) on contiguous chunks of [0, count), for cheap bodies.
  void for_chunks(std::int64_t count, const std::function<void(std::int64_t, std::int64_t, int)>& task);

 private:
  void work(int worker);
  void take_indices(int worker);

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable start_, finished_;
  std::uint64_t round_ = 0;  // guarded by mutex_, as are the next three
  int busy_ = 0;
  bool stopping_ = false;
  std::exception_ptr failure_;
  const std::function<void(std::int64_t, int)>* task_ = nullptr;
  std::int64_t count_ = 0;
  std::atomic<std::int64_t> next_{0};
};

}  // namespace spatialprobe
