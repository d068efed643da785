/* C interface of libvkvx: the operator vkvx::VisualKVAttention on NVIDIA GPUs. docs/operator.md and
 * docs/format.md have the semantics.
 *
 * All pointers are device memory. Calls only launch work on the given stream: no allocation, no
 * synchronisation, nothing that a CUDA graph cannot capture. A call that cannot be honoured returns
 * a code other than 0, launches nothing, and vkvx_last_error() says why. */
#ifndef VKVX_H
#define VKVX_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Written by `python -m vkvx.plugins.generate`, to the mark below. */
/* clang-format off */
#define VKVX_ABI_VERSION 5
#define VKVX_MAX_HEAD_DIM 512
#define VKVX_MAX_VOCAB 524288

enum { VKVX_OK = 0, VKVX_BAD_ARGUMENT = 1, VKVX_UNSUPPORTED = 2, VKVX_WORKSPACE_TOO_SMALL = 3, VKVX_CUDA_ERROR = 4 };
enum { VKVX_FLOAT16 = 0, VKVX_BFLOAT16 = 1, VKVX_FLOAT32 = 2 };
enum { VKVX_MINMAX = 0, VKVX_QUANTILE = 1, VKVX_SHRINK = 2, VKVX_LLOYD = 3, VKVX_SHAPED = 4 };
enum { VKVX_CORRECTION_NONE = 0, VKVX_CORRECTION_AFFINE = 1, VKVX_CORRECTION_EXPECTED = 2 };
enum { VKVX_MASK_CAUSAL = 0, VKVX_MASK_RUN = 1, VKVX_MASK_PREFIX = 2 };
/* Kernels of the attention: the fastest that takes the shape, or a certain one (for tests and measurements). */
enum { VKVX_AUTO = 0, VKVX_PLAIN = 1, VKVX_CODES = 2, VKVX_PLANES = 3, VKVX_PREFILL = 4, VKVX_FEW = 5 };

/* Letters as in docs/operator.md, where T is the type of dtype. Strides are in elements; the last axis of every tensor
 * is contiguous, and so are all tensors without a stride here. At 16 bits key_bits and value_bits are 16, and
 * visual_capacity is 0. */
typedef struct VkvxParams {
  int32_t size;                      /* sizeof(VkvxParams) */
  int32_t dtype;                     /* of T */
  int32_t rows;                      /* B */
  int32_t positions;                 /* S */
  int32_t slots;                     /* Bc */
  int32_t query_heads;               /* Hq */
  int32_t kv_heads;                  /* Hkv */
  int32_t head_dim;                  /* D */
  int32_t group_size;
  int32_t visual_capacity;           /* C */
  int32_t text_capacity;             /* N */
  int32_t visual_entries;            /* Nv */
  int32_t text_entries;              /* Nt */
  int32_t key_bits;                  /* 16 together with value_bits: nothing is packed */
  int32_t value_bits;
  int32_t quantizer;                 /* VKVX_MINMAX to VKVX_SHAPED */
  int32_t correction;                /* VKVX_CORRECTION_NONE to VKVX_CORRECTION_EXPECTED */
  int32_t rotary_dim;                /* channels that RoPE turns, for VKVX_SHAPED; 0: all */
  int32_t rotary_interleaved;        /* 1: RoPE turns neighbours, 0: halves */
  int32_t sliding_window;            /* positions that a token sees, itself included; 0: all */
  int32_t visual_mask;               /* VKVX_MASK_CAUSAL to VKVX_MASK_PREFIX */
  int32_t text_bits;                 /* of text rows: 16, those of T, or 8 */
  int32_t kernel;                    /* VKVX_AUTO, or one of the kernels */
  int32_t splits;                    /* parts of the sequence that run side by side in decode; 0: chosen by shape */
  float quantile_alpha_key;          /* of VKVX_QUANTILE */
  float quantile_alpha_value;
  float shrink_key;                  /* of VKVX_SHRINK */
  float shrink_value;
  float tau;                         /* of VKVX_CORRECTION_AFFINE */
  float correction_limit;            /* of VKVX_CORRECTION_EXPECTED */
  float scale;                       /* of the scores */
  float softcap;                     /* bound of the scores; 0: none */
  int64_t query_stride[3];           /* of row, head, position */
  int64_t key_stride[3];             /* of row, head, position */
  int64_t value_stride[3];           /* of row, head, position */
  const void *query;                 /* T [B, Hq, S, D] */
  const void *key;                   /* T [B, Hkv, S, D] */
  const void *value;                 /* T [B, Hkv, S, D] */
  const int32_t *visual_index;       /* int32 [B, Nv] */
  const int32_t *text_index;         /* int32 [B, Nt] */
  const int32_t *slot;               /* int32 [B] */
  int32_t *visual_key;               /* int32 [Bc, Hkv, C/128, bk, 128, D/32] */
  void *visual_key_params;           /* float16 [Bc, Hkv, G, 3, D] */
  int32_t *visual_value;             /* int32 [Bc, Hkv, C/128, bv, D, 4] */
  void *visual_value_params;         /* float16 [Bc, Hkv, G, 2, D] */
  const int32_t *visual_count;       /* int32 [Bc, G] */
  void *text_key;                    /* T [Bc, Hkv, N, D]; 8 bits: int32 [Bc, Hkv, N, D/4+1] */
  void *text_value;                  /* T [Bc, Hkv, N, D]; 8 bits: int32 [Bc, Hkv, N, D/4+1] */
  const int32_t *text_count;         /* int32 [Bc] */
  /* Of VKVX_SHAPED, for calls with visual entries that are to be packed; null otherwise. */
  const void *key_metric;            /* float16 [Hkv, D, D] */
  const void *value_metric;          /* float16 [Hkv, D, D] */
  const float *rotation;             /* float32 [B, 2, D] */
  /* With a sliding window; null otherwise. */
  const int32_t *window_start;       /* int32 [B, 2, S] */
  void *output;                      /* T [B, Hq, S, D] */
  void *workspace;                   /* zero before its first use, see below */
  size_t workspace_bytes;
} VkvxParams;

/* How the next token of a row is chosen. */
typedef struct VkvxSampleRow {
  float temperature;                 /* 0: the likeliest token */
  float top_p;                       /* 1: all */
  float repetition_penalty;          /* 1: none */
  int32_t top_k;                     /* 0: all */
  uint64_t seed;
  uint32_t step;                     /* of the row's draws, from 0 */
  int32_t wants_log_probability;     /* 1: yes, 0: no */
} VkvxSampleRow;

/* Of a call of vkvx_sample. Bc: slots, of which each row has one of its own. */
typedef struct VkvxSampleParams {
  int32_t size;                      /* sizeof(VkvxSampleParams) */
  int32_t dtype;                     /* of the logits */
  int32_t rows;                      /* B */
  int32_t vocab;                     /* V */
  int64_t logits_stride;             /* of row, in elements */
  const void *logits;                /* [B, V] */
  const VkvxSampleRow *options;      /* [B] */
  const int32_t *slot;               /* int32 [B]; -1: an idle row, of which nothing is read or written */
  uint32_t *seen;                    /* uint32 [Bc, ceil(V/32)], a bit for each token; that of the token is set */
  const uint32_t *excluded;          /* likewise; null: none */
  int32_t *token;                    /* int32 [B] */
  int32_t *last_token;               /* int32 [Bc], of the rows' slots, 0 in place of less; null: not wanted */
  float *log_probability;            /* float32 [B], by the logits as they are, of rows that want it; null: of none */
} VkvxSampleParams;
/* clang-format on */
/* End of what is written. */

/* VKVX_ABI_VERSION of the library. */
int vkvx_abi_version(void);
/* What the last failed call of this thread complained of; empty after none. */
const char* vkvx_last_error(void);
/* Bytes of workspace that vkvx_attention and vkvx_append need for these sizes (pointers and strides
 * are not looked at). The workspace must be zero before its first use; calls leave the part that
 * has to be zero as they found it. Not to be shared by streams. Without a CUDA device: what
 * vkvx_workspace_bound says. */
int vkvx_workspace_bytes(const VkvxParams* params, size_t* bytes);
/* Bytes that suffice for these sizes and all smaller ones on any device, if kernel is VKVX_AUTO and
 * splits 0. Smaller calls can need more than larger ones, as more of their work is done in parts.
 */
int vkvx_workspace_bound(const VkvxParams* params, size_t* bytes);
/* For a workspace that others write to between calls: bytes at its start that have to be zero when
 * vkvx_attention is called with these params. The rest may hold anything. */
int vkvx_workspace_zeroed(const VkvxParams* params, size_t* bytes);
/* output = attention of the call's tokens over what is cached and, causally, over themselves. Reads
 * the caches only. */
int vkvx_attention(const VkvxParams* params, void* stream);
/* Quantises and stores the call's visual tokens, stores its text tokens, in place; run it after
 * vkvx_attention on the same stream. */
int vkvx_append(const VkvxParams* params, void* stream);
/* vkvx_attention, then vkvx_append; in one launch if the call has at most 8 positions, no visual
 * entries and a type of 16 bits. */
int vkvx_step(const VkvxParams* params, void* stream);
/* Chooses each row's next token: greedily, or by chance among the likeliest. Tokens of `excluded`
 * are never chosen, those of `seen` by penalised logits. A token is -1 where a logit is NaN or the
 * greatest infinite, -2 where no token is left. Needs no workspace. docs/kernels.md has the rules.
 */
int vkvx_sample(const VkvxSampleParams* params, void* stream);
/* Where an entry of input_ids [rows] is negative it becomes the last token of the row's slot:
 * last_token [Bc] as vkvx_sample writes it. Idle rows (slot -1) keep what they have. */
int vkvx_last_tokens(int32_t rows, const int32_t* slot, const int32_t* last_token,
                     int32_t* input_ids, void* stream);

#ifdef __cplusplus
}
#endif
#endif
