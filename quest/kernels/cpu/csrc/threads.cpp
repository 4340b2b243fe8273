// The threads that compute a layer together. If torch has loaded an OpenMP runtime, they are its threads. These keep their
// processors busy for milliseconds after each operation of torch, so other threads would have to share the processors.
#include "driver.h"

#include <pthread.h>

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace quest {
namespace {

inline void pause() {
#if QUEST_X86
  __builtin_ia32_pause();
#elif QUEST_ARM
  asm volatile("yield");
#endif
}

// Threads that wait between calls and keep their memory, because starting a thread takes longer than a small layer.
class Pool {
 public:
  // Calls work() on this thread and on up to `others` more.
  void run(int others, const std::function<void()>& work) {
    std::unique_lock<std::mutex> only(caller_, std::try_to_lock);
    if (!only.owns_lock()) return work();  // another caller uses the threads
    try {
      for (; started_ < others; started_++) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      if (others = started_; !others) return work();  // the system gives no thread at all
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      wanted_ = others;
    }
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // a thread that has not begun finds nothing left to do
    while (running_) {
      lock.unlock();
      for (int i = 0; i < SPINS && running_; i++) pause();
      lock.lock();
      if (running_) done_.wait(lock, [this] { return running_ == 0; });
    }
  }

 private:
  static constexpr int SPINS = 2000;  // tens of microseconds, about the time between two layers

  void serve() {
    for (;;) {
      for (int i = 0; i < SPINS && !wanted_; i++) pause();
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return wanted_ > 0; });
      wanted_--;
      running_++;
      const std::function<void()>* work = work_;
      lock.unlock();
      (*work)();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex caller_, mutex_;
  std::condition_variable wake_, done_;
  std::atomic<int> wanted_{0}, running_{0};
  const std::function<void()>* work_ = nullptr;
  int started_ = 0;
};

// GCC's entry point of a parallel region. The runtimes of LLVM and Intel have it too.
using Region = void (*)(void (*task)(void*), void* argument, unsigned threads, unsigned flags);

Region region = nullptr;

// The pool is never destroyed, because its threads wait until the process ends. A child of fork() has none of these threads
// and makes its own pool. It must not use the runtime either, because it would wait for its threads forever.
Pool* pool = new Pool;
const int forgotten = pthread_atfork(nullptr, nullptr, [] { pool = new Pool, region = nullptr; });

}  // namespace

void use_region(void* entry) { region = reinterpret_cast<Region>(entry); }

void run(int others, int threads, const std::function<void()>& work) {
  if (!region) return pool->run(others, work);
  // The region always asks for all threads, because a runtime ends threads that a region does not use.
  region([](void* w) { (*static_cast<const std::function<void()>*>(w))(); },
         const_cast<std::function<void()>*>(&work), static_cast<unsigned>(threads), 0);
}

}  // namespace quest
