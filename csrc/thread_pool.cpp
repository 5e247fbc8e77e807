#include "thread_pool.h"

#include <algorithm>
#include <system_error>
#include <utility>

namespace spatialprobe {

ThreadPool::ThreadPool(int threads) {
  workers_.reserve(std::max(threads - 1, 0));  // now: growing could fail, and threads that run must be joined
  try {
    for (int worker = 1; worker < threads; ++worker) workers_.emplace_back([this, worker] { work(worker); });
  } catch (const std::system_error&) {
    // The system has no more threads to give: those it gave do the work, with the same result.
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  start_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::for_each(std::int64_t count, const std::function<void(std::int64_t, int)>& task) {
  if (workers_.empty() || count <= 1) {
    for (std::int64_t i = 0; i < count; ++i) task(i, 0);
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    task_ = &task;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    busy_ = static_cast<int>(workers_.size());
    ++round_;
  }
  start_.notify_all();
  take_indices(0);
  std::unique_lock<std::mutex> lock(mutex_);
  finished_.wait(lock, [this] { return busy_ == 0; });
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void ThreadPool::for_chunks(std::int64_t count, const std::function<void(std::int64_t, std::int64_t, int)>& task) {
  const std::int64_t chunks = std::min<std::int64_t>(count, threads() == 1 ? 1 : 8 * threads());
  for_each(chunks,
           [&](std::int64_t chunk, int worker) { task(count * chunk / chunks, count * (chunk + 1) / chunks, worker); });
}

void ThreadPool::work(int worker) {
  std::uint64_t seen = 0;
  while (true) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      start_.wait(lock, [&] { return stopping_ || round_ != seen; });
      if (stopping_) return;
      seen = round_;
    }
    take_indices(worker);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--busy_ == 0) finished_.notify_one();
  }
}

void ThreadPool::take_indices(int worker) {
  try {
    for (std::int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*task_)(i, worker);
  } catch (...) {
    next_.store(count_, std::memory_order_relaxed);  // the others stop early
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!failure_) failure_ = std::current_exception();
  }
}

}  // namespace spatialprobe
