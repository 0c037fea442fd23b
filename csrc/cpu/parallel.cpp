#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "../float_environment.h"

namespace fused_sched {
namespace {

// Not OpenMP: torch's wheels bring a libgomp of their own under another name, and two of them in one process
// keep twice the threads spinning.
class ThreadPool {
 public:
  void run(int64_t count, int num_threads, const std::function<void(int64_t)>& body) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(num_threads - 1);
      body_ = &body;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      running_ = active_ = num_workers_ < num_threads - 1 ? num_workers_ : num_threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    drain(body, count);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  // As far as the system gives threads: fewer make the call slower, not wrong. Called with the lock held.
  void grow(int num_workers) {
    try {
      while (num_workers_ < num_workers) {
        std::thread(&ThreadPool::work, this, num_workers_, generation_).detach();
        ++num_workers_;
      }
    } catch (...) {
    }
  }

  void drain(const std::function<void(int64_t)>& body, int64_t count) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
  }

  void work(int index, uint64_t seen) {
    const DefaultFloatEnvironment environment;
    for (;;) {
      const std::function<void(int64_t)>* body;
      int64_t count;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (index >= active_) continue;
        body = body_;
        count = count_;
      }
      drain(*body, count);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  const std::function<void(int64_t)>* body_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  uint64_t generation_ = 0;
  int num_workers_ = 0;
  int active_ = 0;   // workers that take part in this generation
  int running_ = 0;  // of those, how many have not finished
};

std::mutex pool_mutex;

// A forked child has none of the pool's threads, and may have a copy of its locks as another thread held them.
std::atomic<bool> is_forked_child{false};

}  // namespace

void parallel_for_function(int64_t count, int num_threads, const std::function<void(int64_t)>& body) {
  // Never destroyed: its threads may outlive static destruction.
  static ThreadPool& pool = *new ThreadPool;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });
  const int threads = static_cast<int>(count < num_threads ? count : num_threads);
  const DefaultFloatEnvironment environment;
  if (threads > 1 && registered == 0 && !is_forked_child && pool_mutex.try_lock()) {
    std::lock_guard<std::mutex> lock(pool_mutex, std::adopt_lock);
    pool.run(count, threads, body);
    return;
  }
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace fused_sched
