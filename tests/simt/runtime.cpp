// SPDX-License-Identifier: Apache-2.0
// Runs a grid on one host thread. Every CUDA thread is a fiber with a stack of its own; blocks run one after the other.
// A fiber runs until it waits (barrier, warp exchange) or ends; then the next one in the order of the schedule does.
// Memory faults, misaligned vectors and integer overflows inside a kernel, barriers that cannot be passed and launches
// that a GPU would refuse become C++ exceptions.
#include <cuda_runtime.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime.h"

namespace simt {

uint3 thread_index, block_index;
dim3 block_size, grid_size;
int shared_limit = 227 << 10;
Contexts contexts{{false, false}, -1};

namespace {

// The driver's functions that DeviceGuard asks for. A context is a pointer to its device's number.
constexpr int kDeviceNumbers[kDevices] = {0, 1};
int context_current(const int** context) {
  *context = contexts.current < 0 ? nullptr : &kDeviceNumbers[contexts.current];
  return 0;
}
int context_device(int* device) {
  if (contexts.current < 0) return 201;  // CUDA_ERROR_INVALID_CONTEXT
  *device = contexts.current;
  return 0;
}
int context_make_current(const int* context) {
  contexts.current = context == nullptr ? -1 : *context;
  return 0;
}

constexpr size_t kStack = 64 << 10, kGuard = 4096, kMaxShared = 227 << 10, kDefaultShared = 48 << 10;

enum class State { ready, barrier, warp, done };

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  State state;
  uint3 index;
};

struct Warp {
  unsigned arrived, turn;
  const char* operation;
  alignas(16) char slots[2][32][64];
};

Schedule schedule = Schedule::ascending;
std::map<const void*, int> allowed;

std::vector<Fiber> fibers;
std::vector<Warp> warps;
char *stacks, *shared_memory, *shared_end;
size_t stack_count;
Fiber* current;
int threads, waiting, alive;
Body body;
const void* context;
std::string failure;
sigjmp_buf on_fault;
volatile sig_atomic_t running;
#if defined(__x86_64__)
void* scheduler;
#else
ucontext_t scheduler;
#endif

std::string place(const Fiber& fiber) {
  const auto triple = [](const auto& v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
  };
  return "block " + triple(block_index) + ", thread " + triple(fiber.index);
}

#if defined(__x86_64__)
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.hidden simt_switch
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
void to_scheduler() {
  simt_switch(&current->stack_pointer, scheduler);
}
void to_fiber(Fiber& fiber) {
  simt_switch(&scheduler, fiber.stack_pointer);
}
#else
void to_scheduler() {
  swapcontext(&current->context, &scheduler);
}
void to_fiber(Fiber& fiber) {
  swapcontext(&scheduler, &fiber.context);
}
#endif

void wait(State state) {
  current->state = state;
  to_scheduler();
}

void release(State state, size_t first, size_t end) {
  for (size_t i = first; i < end; ++i) {
    if (fibers[i].state == state) fibers[i].state = State::ready;
  }
}

void pass_barrier_if_complete() {
  if (waiting > 0 && waiting == alive) {
    waiting = 0;
    release(State::barrier, 0, size_t(threads));
  }
}

void fiber_main() {
  body(context);
  current->state = State::done;
  --alive;
  pass_barrier_if_complete();
  to_scheduler();
}

void make_fiber(Fiber& fiber, char* stack) {
  fiber.state = State::ready;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
}

void handle_fault(int signal, siginfo_t* info, void*) {
  if (!running) return;
  char address[32];
  std::snprintf(address, sizeof address, "%p", info->si_addr);
  failure =
      signal == SIGILL ? "misaligned access or integer overflow" : std::string("access outside memory at ") + address;
  siglongjmp(on_fault, 1);
}

struct FaultHandlers {
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
  struct sigaction previous[4];
  stack_t previous_stack;
  FaultHandlers() {
    static char alternative[64 << 10];
    stack_t stack{};
    stack.ss_sp = alternative;
    stack.ss_size = sizeof alternative;
    sigaltstack(&stack, &previous_stack);
    struct sigaction action{};
    action.sa_sigaction = handle_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &previous[i]);
  }
  ~FaultHandlers() {
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &previous[i], nullptr);
    sigaltstack(&previous_stack, nullptr);
  }
};

char* map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

void prepare(int count) {
  if (shared_memory == nullptr) {
    const size_t size = (kMaxShared + kGuard - 1) / kGuard * kGuard;
    shared_memory = map(size + kGuard);
    shared_end = shared_memory + size;
    mprotect(shared_end, kGuard, PROT_NONE);
  }
  if (stack_count < size_t(count)) {
    if (stacks != nullptr) munmap(stacks, stack_count * (kStack + kGuard));
    stacks = map(size_t(count) * (kStack + kGuard));
    stack_count = size_t(count);
    for (int i = 0; i < count; ++i) mprotect(stacks + size_t(i) * (kStack + kGuard), kGuard, PROT_NONE);
  }
  fibers.resize(size_t(count));
  warps.resize(size_t(count + 31) / 32);
}

template <class T>
void arrange(std::vector<T>& order, std::mt19937& random) {
  if (schedule == Schedule::descending) std::reverse(order.begin(), order.end());
  if (schedule == Schedule::shuffled) std::shuffle(order.begin(), order.end(), random);
}

char* shared_base;

bool run_block(size_t shared_bytes, std::mt19937& random) {
  shared_base = shared_end - (shared_bytes + 15) / 16 * 16;
  std::memset(shared_base, 0xff, size_t(shared_end - shared_base));  // not a number, and no index
  waiting = 0;
  alive = threads;
  std::vector<int> order(static_cast<size_t>(threads));
  for (int i = 0; i < threads; ++i) {
    order[size_t(i)] = i;
    make_fiber(fibers[size_t(i)], stacks + size_t(i) * (kStack + kGuard) + kGuard);
    const unsigned t = unsigned(i), x = block_size.x, y = block_size.y;
    fibers[size_t(i)].index = {t % x, t / x % y, t / x / y};
  }
  for (Warp& warp : warps) warp = Warp{};
  arrange(order, random);
  while (alive > 0) {
    bool moved = false;
    for (const int i : order) {
      Fiber& fiber = fibers[size_t(i)];
      if (fiber.state != State::ready) continue;
      current = &fiber;
      thread_index = fiber.index;
      to_fiber(fiber);
      moved = true;
      if (!failure.empty()) return false;
    }
    if (moved) continue;
    for (const Fiber& fiber : fibers) {
      if (fiber.state == State::warp) {
        const Warp& warp = warps[size_t(&fiber - fibers.data()) / 32];
        failure = std::string("not all lanes come to ") + warp.operation;
        current = const_cast<Fiber*>(&fiber);
        return false;
      }
    }
    failure = "not all threads come to a barrier";
    return false;
  }
  return true;
}

void check(bool ok, const char* op, const std::string& what) {
  if (!ok) throw std::runtime_error(std::string(op) + ": " + what);
}

}  // namespace

void set_schedule(Schedule value) {
  schedule = value;
}

void* driver_function(const char* name) {
  const std::string wanted(name);
  if (wanted == "cuCtxGetCurrent") return reinterpret_cast<void*>(context_current);
  if (wanted == "cuCtxGetDevice") return reinterpret_cast<void*>(context_device);
  if (wanted == "cuCtxSetCurrent") return reinterpret_cast<void*>(context_make_current);
  return nullptr;
}

void allow_shared(const void* kernel, int bytes) {
  allowed[kernel] = bytes;
}

char* dynamic_shared() {
  return shared_base;
}

void sync_threads() {
  ++waiting;
  current->state = State::barrier;
  pass_barrier_if_complete();
  to_scheduler();
}

const char* exchange(const void* value, unsigned bytes, unsigned mask, const char* operation) {
  const size_t thread = size_t(current - fibers.data()), lane = thread % 32, first = thread - lane;
  Warp& warp = warps[thread / 32];
  if (mask != 0xffffffffu) failure = std::string(operation) + " with a partial mask";
  if (size_t(threads) - first < 32) failure = std::string(operation) + " in a partial warp";
  if (warp.arrived != 0 && warp.operation != operation && std::strcmp(warp.operation, operation) != 0)
    failure = std::string("lanes of one warp come to ") + warp.operation + " and " + operation;
  if (!failure.empty()) to_scheduler();
  const unsigned turn = warp.turn & 1;
  warp.operation = operation;
  if (bytes > 0) std::memcpy(warp.slots[turn][lane], value, bytes);
  warp.arrived |= 1u << lane;
  if (warp.arrived == 0xffffffffu) {
    warp.arrived = 0;
    ++warp.turn;
    release(State::warp, first, first + 32);
  } else {
    wait(State::warp);
  }
  return warp.slots[turn][0];
}

void sync_warp() {
  exchange(nullptr, 0, 0xffffffffu, "__syncwarp");
}

void run(const char* op, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, Body kernel_body,
         const void* arguments) {
  const auto limit = [&](const char* what, uint64_t value, uint64_t most) {
    check(value >= 1 && value <= most, op, std::string("launch with ") + what + " = " + std::to_string(value));
  };
  limit("gridDim.x", grid.x, 2147483647);
  limit("gridDim.y", grid.y, 65535);
  limit("gridDim.z", grid.z, 65535);
  limit("blockDim.z", block.z, 64);
  limit("threads", uint64_t(block.x) * block.y * block.z, 1024);
  const auto found = allowed.find(kernel);
  const size_t most =
      found == allowed.end() || size_t(found->second) < kDefaultShared ? kDefaultShared : size_t(found->second);
  check(shared_bytes <= std::min(most, kMaxShared), op,
        "launch with " + std::to_string(shared_bytes) + " bytes of shared memory");
  threads = int(block.x * block.y * block.z);
  prepare(threads);
  block_size = block;
  grid_size = grid;
  body = kernel_body;
  context = arguments;
  failure.clear();
  std::mt19937 random(7);
  const size_t count = size_t(grid.x) * grid.y * grid.z;
  check(count < (1u << 24), op, "a grid of " + std::to_string(count) + " blocks is too large to emulate");
  std::vector<unsigned> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = unsigned(i);
  arrange(order, random);
  const FaultHandlers handlers;
  if (sigsetjmp(on_fault, 1) == 0) {
    running = 1;
    for (const unsigned i : order) {
      block_index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
      if (!run_block(shared_bytes, random)) break;
    }
  }
  running = 0;
  if (!failure.empty()) throw std::runtime_error(std::string(op) + ": " + failure + ", " + place(*current));
}

}  // namespace simt
