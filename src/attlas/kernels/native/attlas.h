// attlas.h: the C ABI. Plain structs and functions, no torch; every size and stride is int64.
//
//   scores  = softcap(scale * query . key) + bias, where allowed, else -inf
//   m = max(scores, sink),   l = sum_keys exp(scores - m) + exp(sink - m)
//   weights = exp(scores - m) / l,   output = dropout(weights) @ value
//
// The normaliser of a row is the pair (m, l), with the two roundings of a plain softmax; one number,
// m + log(l), would round large scores away. A row without keys has (-inf, 1).
//
// query [B,Hq,L,E], key [B,Hkv,S,E], value [B,Hkv,S,Ev]; the last dimension is contiguous, the
// others have any stride (in elements). Query head h reads key/value head h / (Hq/Hkv).
// Statistics, normaliser, bias and sinks have the compute type: float, or double for double inputs.
// A null pointer means "not given" or "not wanted".
#pragma once
#include <cstdint>

extern "C" {

typedef void (*attlas_range_fn)(int64_t begin, int64_t end, void* ctx);
// The signature of torch_parallel_for in the stable C shim of libtorch_cpu.
typedef int32_t (*attlas_parallel_for)(int64_t begin, int64_t end, int64_t grain,
                                       attlas_range_fn fn, void* ctx);

// To be raised, here and in library.py, with any change of what a field or a function means.
enum { ATTLAS_ABI = 2 };
enum { ATTLAS_F32 = 0, ATTLAS_F64 = 1, ATTLAS_BF16 = 2, ATTLAS_F16 = 3 };

typedef struct {
  int64_t B, Hq, Hkv, L, S, E, Ev;
  int64_t dtype, num_threads;
  attlas_parallel_for parallel_for;          // null: run on the calling thread
  double scale, softcap;                     // softcap 0: none
  const void *q, *k, *v;
  int64_t q_s[3], k_s[3], v_s[3];            // strides of batch, head, row
  const int64_t *start, *stop;               // allowed keys [start, stop) of each query row
  int64_t start_s[3], stop_s[3];             // strides over B, Hq, L (0 broadcasts)
  const uint8_t* mask; int64_t mask_s[4];    // 1 = may attend; strides over B, Hq, L, S
  const void* bias; int64_t bias_s[4];
  const void* sinks;                         // [Hq]
  double dropout_p;                          // of the output and its gradient; 0: none
  uint64_t seed;                             // which weights are dropped: see random.h
  int64_t first_row;                         // the position of row 0 in the whole call
} attlas_problem;

typedef struct {
  void* output; int64_t output_s[3];         // [B,Hq,L,Ev], dtype of the inputs
  void* weights; int64_t weights_s[3];       // [B,Hq,L,S],  dtype of the inputs
  void* normaliser;                          // [B,Hq,L,2] contiguous: m and l of each row
  void *entropy, *max_value;                 // [B,Hq,L] contiguous
  int64_t* max_key;                          // [B,Hq,L]
  void* received;                            // [B,Hq,S] contiguous: sums over the queries
} attlas_forward_out;

typedef struct {                             // what a later call reads from q, k and the normaliser
  const void* normaliser;                    // [B,Hq,L,2] contiguous, of the whole rows
  int64_t row0, row1, key0, key1;            // the tile to read; ranges within [0,L], [0,S]
  void *entropy, *max_value; int64_t* max_key;      // [B,Hq,rows], over the keys of the tile
  void* topk_value; int64_t* topk_key; int64_t k;   // [B,Hq,rows,k], descending
  void *received, *received_max;             // [B,Hq,keys], over the queries of the tile
  const void* row_weight;                    // [B,Hq,rows] or null: factors for `received`
  const void* x; int64_t F; void* wx;        // x [B,Hq,keys,F] -> wx [B,Hq,rows,F]
  const void* y; void* wty;                  // y [B,Hq,rows,F] -> wty [B,Hq,keys,F]
  int64_t cell_rows, cell_keys;              // > 0: pool over cells of the tile
  void *pool_max, *pool_mass;                // [B,Hq,ceil(rows/cell_rows),ceil(keys/cell_keys)]
  void* weights; int64_t weights_s[3];       // [B,Hq,rows,keys], dtype of the inputs
  void *tile_weights, *tile_scores;          // [B,Hq,rows,keys] contiguous, compute type: the weights, and
                                             // score - m: -inf where masked, NaN where the weight is
  void* head_mean;                           // [B,rows,keys] contiguous, compute type: W over all heads
} attlas_readout;

typedef struct {
  const void *output, *normaliser;           // of the forward; output_s: strides
  int64_t output_s[3];
  const void* d_output; int64_t d_output_s[3];      // [B,Hq,L,Ev] or null
  const void* d_lse;                         // [B,Hq,L] or null: the gradient of m + log(l)
  const void *d_entropy, *entropy;           // [B,Hq,L] or null; entropy goes with d_entropy
  const void* d_received;                    // [B,Hq,S] or null
  const void* row_weight;                    // [B,Hq,L] or null: factors of d_received
  const void* d_weights; int64_t d_weights_s[3];    // [B,Hq,L,S], dtype of the inputs, or null
  void *dq, *dk, *dv;                        // contiguous, shapes and dtype of q, k, v; or null
  void* dbias;                               // [B,Hq,L,S] contiguous or null, compute type
  void* dsinks;                              // [B,Hq,L] or null: to be summed over B and L
  void* minus_rowsum;                        // [B,Hq,L] or null. Given: the normaliser is a variable of
} attlas_backward_args;                      // its own; -rowsum(P dP), the gradient of m + log(l), goes here

// Each returns 0, or 1 when memory for the workspace cannot be had. None throws.
int attlas_forward(const attlas_problem*, const attlas_forward_out*);
int attlas_read(const attlas_problem*, const attlas_readout*);
int attlas_backward(const attlas_problem*, const attlas_backward_args*);
void* attlas_bytes(int64_t bytes);           // a uint8 tensor as a DLManagedTensor, or null
int64_t attlas_release(void);                // give all memory that is kept to the system; bytes
const char* attlas_isa(void);
void attlas_abi(int64_t*);                   // ATTLAS_ABI, and the sizes of the four structs above
}
