// native_threads.cpp: the kernels on a pool of std::thread, for ThreadSanitizer (`make sanitize`).
//
// ThreadSanitizer does not see the synchronisation of torch's pool, whose library it did not compile,
// and would report what is none. So here is a parallel_for of our own, and no torch and no Python.
// Each case runs forward, read and backward with all that attlas.h can give, first with that
// pool and then on one thread, and compares them bit for bit. The last one has several callers at
// once. The process ends with 66 where there was a race (by ThreadSanitizer), with 1 where bits
// differ or where a case did not reach a second thread.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <utility>
#include <vector>
#include "attlas.h"

namespace {

constexpr int64_t THREADS = 4;
std::atomic<int64_t> shared_calls{0};

// What torch_parallel_for does: cuts the range, and returns when all of it has been run.
int32_t parallel_for(int64_t begin, int64_t end, int64_t grain, attlas_range_fn fn, void* ctx) {
  const int64_t parts = std::min(THREADS, (end - begin + grain - 1) / grain);
  const int64_t step = (end - begin + parts - 1) / parts;
  if (parts > 1) shared_calls++;
  std::vector<std::thread> threads;
  for (int64_t first = begin + step; first < end; first += step)
    threads.emplace_back(fn, first, std::min(end, first + step), ctx);
  fn(begin, std::min(end, begin + step), ctx);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

struct Case {
  const char* name;
  int64_t B, Hq, Hkv, L, S, E;
  bool everything = true;     // else only the output, and gradients from it
  bool nan = false;           // a few values are NaN
  bool causal = false;        // intervals of keys, and a mask
  double dropout = 0;
  bool bf16 = false;
};

const Case CASES[] = {
  {"many heads", 2, 8, 8, 70, 90, 24},
  {"few heads, many rows", 1, 1, 1, 400, 300, 24},
  {"grouped heads", 1, 8, 2, 60, 130, 32},
  {"keys split, few rows", 1, 2, 1, 4, 9000, 16},
  {"keys split, more rows", 1, 1, 1, 40, 9000, 16},
  {"keys split, output only", 1, 2, 2, 3, 9000, 16, false},
  {"output only", 1, 4, 4, 200, 200, 32, false},
  {"NaN values", 1, 4, 4, 100, 150, 24, true, true},
  {"NaN values, keys split", 1, 2, 2, 4, 9000, 16, false, true},
  {"masks, bias and sinks", 2, 4, 2, 90, 90, 24, true, false, true},
  {"dropout", 1, 4, 4, 100, 100, 24, true, false, false, 0.3},
  {"bf16", 1, 4, 4, 100, 150, 32, true, false, false, 0, true},
};

// Every array of a call, from a fixed seed; 2 bytes of bf16 or 4 of float for each number.
class Call {
 public:
  Call(const Case& c, attlas_parallel_for share) : c_(c), draw_(1), size_(c.bf16 ? 2 : 4) {
    p_.B = c.B, p_.Hq = c.Hq, p_.Hkv = c.Hkv, p_.L = c.L, p_.S = c.S, p_.E = p_.Ev = c.E;
    p_.dtype = c.bf16 ? ATTLAS_BF16 : ATTLAS_F32;
    p_.num_threads = THREADS, p_.parallel_for = share;
    p_.scale = 1 / std::sqrt(double(c.E));
    p_.q = input(c.Hq, c.L, p_.q_s), p_.k = input(c.Hkv, c.S, p_.k_s), p_.v = input(c.Hkv, c.S, p_.v_s);
    if (c.nan)
      for (int64_t i = 0; i < c.B * c.Hkv * c.S * c.E; i += 997) put((char*)p_.v, i, std::numeric_limits<float>::quiet_NaN());
    p_.dropout_p = c.dropout, p_.seed = 5;
    if (c.causal) mask();
  }

  // The three functions, one after the other; false without memory.
  bool run() {
    const int64_t rows = c_.B * c_.Hq * c_.L, columns = c_.B * c_.Hq * c_.S, all = rows * c_.S;
    attlas_forward_out out{};
    out.output = room(rows * c_.E, size_), stride(out.output_s, c_.Hq, c_.L, c_.E);
    out.normaliser = room(2 * rows, 4);              // room for two numbers of each row
    if (c_.everything) {
      out.weights = room(all, size_), stride(out.weights_s, c_.Hq, c_.L, c_.S);
      out.entropy = room(rows, 4), out.max_value = room(rows, 4), out.max_key = (int64_t*)room(rows, 8);
      out.received = room(columns, 4);
    }
    if (attlas_forward(&p_, &out)) return false;

    attlas_problem readable = p_;             // readouts are of the weights before dropout
    readable.dropout_p = 0, readable.v = nullptr;
    attlas_readout read{};
    read.normaliser = out.normaliser, read.row1 = c_.L, read.key1 = c_.S;
    read.entropy = room(rows, 4), read.received = room(columns, 4);
    if (c_.everything) {
      read.max_value = room(rows, 4), read.max_key = (int64_t*)room(rows, 8);
      read.k = 3, read.topk_value = room(3 * rows, 4), read.topk_key = (int64_t*)room(3 * rows, 8);
      read.received_max = room(columns, 4), read.row_weight = numbers(rows);
      read.F = 5, read.x = numbers(5 * columns), read.wx = room(5 * rows, 4);
      read.y = numbers(5 * rows), read.wty = room(5 * columns, 4);
      read.cell_rows = 7, read.cell_keys = 37;
      const int64_t cells = c_.B * c_.Hq * ((c_.L + 6) / 7) * ((c_.S + 36) / 37);
      read.pool_max = room(cells, 4), read.pool_mass = room(cells, 4);
      read.weights = room(all, size_), stride(read.weights_s, c_.Hq, c_.L, c_.S);
    }
    if (attlas_read(&readable, &read)) return false;

    attlas_backward_args back{};
    back.output = out.output, back.normaliser = out.normaliser, stride(back.output_s, c_.Hq, c_.L, c_.E);
    back.d_output = halves(rows * c_.E), stride(back.d_output_s, c_.Hq, c_.L, c_.E);
    if (c_.everything) {
      back.d_lse = numbers(rows), back.d_entropy = numbers(rows), back.entropy = out.entropy;
      back.d_received = numbers(columns), back.row_weight = numbers(rows);
      back.d_weights = halves(all), stride(back.d_weights_s, c_.Hq, c_.L, c_.S);
    }
    back.dq = room(rows * c_.E, size_);
    back.dk = room(c_.B * c_.Hkv * c_.S * c_.E, size_), back.dv = room(c_.B * c_.Hkv * c_.S * c_.E, size_);
    if (p_.bias) back.dbias = room(all, 4);
    if (p_.sinks) back.dsinks = room(rows, 4);
    return attlas_backward(&p_, &back) == 0;
  }

  bool same(const Call& other) const { return results_ == other.results_; }

 private:
  using Bytes = std::vector<char>;

  void put(char* to, int64_t i, float x) const {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t high = uint16_t(bits >> 16);
    memcpy(to + i * size_, size_ == 2 ? (void*)&high : (void*)&bits, size_t(size_));
  }
  void* halves(int64_t count) {               // random, in the dtype of the inputs
    inputs_.emplace_back(size_t(count * size_));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; i++) put(inputs_.back().data(), i, normal(draw_));
    return inputs_.back().data();
  }
  void* numbers(int64_t count) {              // random, float
    const int64_t size = std::exchange(size_, 4);
    void* found = halves(count);
    size_ = size;
    return found;
  }
  void* room(int64_t count, int64_t size) {
    results_.emplace_back(size_t(count * size));
    return results_.back().data();
  }
  static void stride(int64_t* to, int64_t heads, int64_t rows, int64_t size) {
    to[0] = heads * rows * size, to[1] = rows * size, to[2] = size;
  }
  void* input(int64_t heads, int64_t rows, int64_t* strides) {
    stride(strides, heads, rows, c_.E);
    return halves(c_.B * heads * rows * c_.E);
  }
  void mask() {
    for (int64_t i = 0; i < c_.L; i++) start_.push_back(0), stop_.push_back(std::min(i + 1, c_.S));
    p_.start = start_.data(), p_.stop = stop_.data(), p_.start_s[2] = p_.stop_s[2] = 1;
    holes_.resize(size_t(c_.L * c_.S));
    for (char& hole : holes_) hole = draw_() % 4 > 0;
    p_.mask = (const uint8_t*)holes_.data(), p_.mask_s[2] = c_.S, p_.mask_s[3] = 1;
    p_.bias = numbers(c_.L * c_.S), p_.bias_s[2] = c_.S, p_.bias_s[3] = 1;
    p_.sinks = numbers(c_.Hq);
  }

  Case c_;
  std::mt19937 draw_;
  int64_t size_;
  attlas_problem p_{};
  std::vector<Bytes> inputs_, results_;       // a vector keeps the memory of its elements when it grows
  std::vector<int64_t> start_, stop_;
  Bytes holes_;
};

bool check(const Case& c) {
  const int64_t before = shared_calls;
  Call pooled(c, parallel_for), alone(c, nullptr);
  const char* wrong = nullptr;
  if (!pooled.run() || !alone.run()) wrong = "there is no memory";
  else if (!pooled.same(alone)) wrong = "the bits depend on the threads";
  else if (shared_calls == before) wrong = "nothing was shared";
  printf("%-26s %s\n", c.name, wrong ? wrong : "ok");
  return !wrong;
}

// --- memory that is kept, taken and given by several threads at once ----------------------------

struct Tensor {                               // of DLPack, as attlas_bytes gives it
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
  void* manager_ctx;
  void (*deleter)(Tensor*);
};

bool callers() {
  std::atomic<bool> good{true};
  std::vector<std::thread> threads;
  for (int caller = 0; caller < 4; caller++)
    threads.emplace_back([&good, caller] {
      for (int turn = 0; turn < 6; turn++) {
        const Case& c = CASES[(caller + 4 * turn) % (sizeof CASES / sizeof *CASES)];
        Call first(c, parallel_for), again(c, parallel_for);
        if (!first.run() || !again.run() || !first.same(again)) good = false;
        const int64_t bytes = int64_t(1) << (20 + 2 * caller);
        auto* tensor = (Tensor*)attlas_bytes(bytes);
        if (!tensor) { good = false; continue; }
        memset(tensor->data, caller, size_t(bytes));
        for (int64_t i = 0; i < bytes; i += 4096)
          if (((char*)tensor->data)[i] != caller) good = false;
        tensor->deleter(tensor);
        if (turn % 2) attlas_release();
      }
    });
  for (std::thread& thread : threads) thread.join();
  printf("%-26s %s\n", "several callers at once", good ? "ok" : "results differ");
  return good;
}

}  // namespace

int main() {
  setvbuf(stdout, nullptr, _IOLBF, 0);        // the case that ThreadSanitizer ends is the one after the last
  bool good = true;
  for (const Case& c : CASES) good = check(c) && good;
  good = callers() && good;
  printf("%s, %d threads\n", attlas_isa(), int(THREADS));
  return good ? 0 : 1;
}
