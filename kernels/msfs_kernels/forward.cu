// FlashAttention forward in CUDA C++ for readers who come from CUDA (Dao 2023, Algorithm 1).
//
//     O = softmax(scale * Q K^T + mask) V        L = row log-sum-exp of the scores
//
// One thread block owns ROWS queries of one head and walks over the keys in tiles of KEYS. The scores of
// a tile live in registers only, so memory never sees the T x S matrix. Two facts make that possible:
//
// 1. Online softmax. Keep for every row the running maximum m and the running sum l of exp(s - m).
//    When a tile raises the maximum from m to m', everything summed so far was too large by
//    exp(m' - m): multiply l and the output row by exp(m - m'), then add the tile. Divide by l once,
//    at the end. Line numbers below (A1:9 ...) are those of the paper's Algorithm 1.
// 2. Tensor cores. `mma.sync.m16n8k16` multiplies a 16 x 16 tile by a 16 x 8 tile into fp32 with the
//    32 threads of a warp. Which thread holds which element ("fragment") is fixed by the hardware:
//
//        lane = 4 * group + pair            group in 0..7, pair in 0..3
//        A (16 x 16): a0 = A[group][2 pair, +1]      a1 = A[group + 8][2 pair, +1]
//                     a2 = A[group][2 pair + 8, +9]  a3 = A[group + 8][2 pair + 8, +9]
//        B (16 x 8):  b0 = B[2 pair, +1][group]      b1 = B[2 pair + 8, +9][group]
//        C (16 x 8):  c0, c1 = C[group][2 pair, +1]  c2, c3 = C[group + 8][2 pair, +1]
//
//    Two neighbouring C tiles of the scores therefore already have the layout of one A tile: the
//    probabilities go from the first product into the second without leaving their thread.
//
// A row of scores is spread over the 4 lanes of a group only, so a row maximum or sum takes two
// shuffles. A warp owns 16 rows whole; warps never talk to each other except to share K and V tiles.
//
// Copies run behind the arithmetic: `cp.async` moves 16 bytes from global to shared memory without
// passing a register. While a tile's scores are computed its values arrive; while its values are
// multiplied the next tile's keys arrive. One buffer for K and one for V are enough for that.
//
// Compiled at run time with -DHEAD_DIM=64|128 and -DBF16=0|1. Inputs: q (B, H, T, HEAD_DIM),
// k and v (B, G, S, HEAD_DIM), unit stride in the last dim, other strides a multiple of 8 elements.

typedef unsigned int u32;
typedef unsigned short u16;  // one bf16 or fp16, never looked into here

constexpr int ROWS = 64, KEYS = 64, THREADS = 128;  // 4 warps of 16 query rows
constexpr int PITCH = HEAD_DIM + 8;  // 16 bytes of padding: 8 rows of one column touch all 32 banks
constexpr int CHUNKS = HEAD_DIM / 8;  // 16-byte pieces of one row
constexpr float LOG2E = 1.4426950408889634f;
constexpr float NEVER = -1e30f;  // a masked score; finite, so that the difference of two is 0, not NaN

__device__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- the four instructions this kernel is made of -----------------------------------------------

// Copy 16 bytes global -> shared in the background; a row outside the matrix is filled with zeros.
__device__ void copy16(u32 to, const u16* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0));
}
__device__ void commit() { asm volatile("cp.async.commit_group;"); }
// Wait until at most one group of copies, the newest, is still on its way.
__device__ void wait_all_but_newest() { asm volatile("cp.async.wait_group 1;"); }

// Read four 8 x 8 tiles from shared memory in fragment layout; lane i names a row of tile i / 8.
__device__ void load_tiles(u32 r[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row));
}
__device__ void load_tiles_transposed(u32 r[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row));
}

// C += A B, 16 x 8 x 16, fp32 accumulation.
__device__ void mma(float c[4], const u32 a[4], u32 b0, u32 b1) {
#if BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Round two floats to 16 bits and pack them, `low` in the low half.
__device__ u32 pack(float low, float high) {
    u32 packed;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
    return packed;
}

// ---- pieces of the algorithm --------------------------------------------------------------------

// Start copying 64 rows of HEAD_DIM elements, from row `first`, into a padded shared tile.
__device__ void start_copy(u16 (*tile)[PITCH], const u16* matrix, long long row_stride, int first, int rows) {
    for (int i = threadIdx.x; i < 64 * CHUNKS; i += THREADS) {
        int r = i / CHUNKS, c = i % CHUNKS * 8;
        bool inside = first + r < rows;
        copy16(shared_address(&tile[r][c]), matrix + (inside ? (first + r) * row_stride : 0) + c, inside);
    }
}

// Maximum or sum over the four lanes that share a row.
__device__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// Grid: (row tiles, H, B); 128 threads. `scale` > 0 multiplies q k; causal means key j <= row i + S - T.
extern "C" __global__ void __launch_bounds__(THREADS) flash_forward(
    const u16* q, const u16* k, const u16* v, u16* o, float* lse,
    int T, int S, int heads, int heads_per_group,
    int q_batch, int q_head, int q_row, int k_batch, int k_head, int k_row, int v_batch, int v_head, int v_row,
    int causal, double scale) {
    __shared__ __align__(16) u16 tile_k[KEYS][PITCH], tile_v[KEYS][PITCH];
    const int head = blockIdx.y, batch = blockIdx.z, group = head / heads_per_group;
    // Causal tiles near the bottom have the most keys: start them first, so that the short ones fill gaps.
    const int first_row = (gridDim.x - 1 - blockIdx.x) * ROWS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pair = lane % 4;
    const int row0 = first_row + warp * 16 + lane / 4, row1 = row0 + 8;  // the two rows of this thread
    q += (long long)batch * q_batch + (long long)head * q_head;
    k += (long long)batch * k_batch + (long long)group * k_head;
    v += (long long)batch * v_batch + (long long)group * v_head;

    // Q goes through the key tile once and then stays in registers for good (A1:5).
    u32 fragment_q[HEAD_DIM / 16][4];
    start_copy(tile_k, q, q_row, first_row, T);
    commit(), commit();
    wait_all_but_newest();
    __syncthreads();
    for (int d = 0; d < HEAD_DIM / 16; d++)
        load_tiles(fragment_q[d], shared_address(&tile_k[warp * 16 + lane % 16][d * 16 + lane / 16 * 8]));
    __syncthreads();

    // Keys beyond the last visible one of the tile's last row are never touched.
    const int offset = S - T;
    const int keys = causal ? min(S, max(0, first_row + ROWS + offset)) : S;
    const float scale2 = (float)scale * LOG2E;  // exp(x) = exp2(x log2 e), and the hardware has exp2
    float out[HEAD_DIM / 8][4] = {}, m[2] = {NEVER, NEVER}, l[2] = {0.f, 0.f};  // A1:6

    start_copy(tile_k, k, k_row, 0, S), commit();
    start_copy(tile_v, v, v_row, 0, S), commit();
    for (int first_key = 0; first_key < keys; first_key += KEYS) {
        // Scores of 16 rows x 64 keys a warp: 8 C tiles (A1:8).
        wait_all_but_newest();
        __syncthreads();
        float s[KEYS / 8][4] = {};
        for (int d = 0; d < HEAD_DIM / 16; d++)
            for (int n = 0; n < KEYS / 16; n++) {  // 16 keys x 16 dims: two B tiles, K's rows are B's columns
                u32 b[4];
                load_tiles(b, shared_address(&tile_k[n * 16 + lane / 16 * 8 + lane % 8][d * 16 + lane / 8 % 2 * 8]));
                mma(s[2 * n], fragment_q[d], b[0], b[1]);
                mma(s[2 * n + 1], fragment_q[d], b[2], b[3]);
            }
        __syncthreads();  // every warp is done with these keys
        start_copy(tile_k, k, k_row, first_key + KEYS, S), commit();

        // Only the last key tile and tiles on the diagonal need a mask at all.
        if (first_key + KEYS > S || (causal && first_key + KEYS > first_row + offset + 1))
            for (int n = 0; n < KEYS / 8; n++)
                for (int e = 0; e < 4; e++) {
                    int key = first_key + n * 8 + pair * 2 + e % 2, row = e < 2 ? row0 : row1;
                    if (key >= S || (causal && key > row + offset)) s[n][e] = NEVER;
                }

        // Online softmax for rows group and group + 8 (A1:9, A1:10 without the products).
        for (int half = 0; half < 2; half++) {
            float top = NEVER, sum = 0.f;
            for (int n = 0; n < KEYS / 8; n++) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            top = fmaxf(m[half], row_max(top) * scale2);  // scale > 0: the largest score stays the largest
            float shrink = exp2f(m[half] - top);
            for (int n = 0; n < KEYS / 8; n++)
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    s[n][e] = s[n][e] == NEVER ? 0.f : exp2f(s[n][e] * scale2 - top);
                    sum += s[n][e];
                }
            l[half] = l[half] * shrink + sum;  // summed over the four lanes once, after the loop
            for (int n = 0; n < HEAD_DIM / 8; n++) out[n][2 * half] *= shrink, out[n][2 * half + 1] *= shrink;
            m[half] = top;
        }

        // out += P V (A1:10): two C tiles of P are one A tile; V is read transposed as B wants it.
        wait_all_but_newest();
        __syncthreads();
        for (int n = 0; n < KEYS / 16; n++) {
            u32 p[4] = {pack(s[2 * n][0], s[2 * n][1]), pack(s[2 * n][2], s[2 * n][3]),
                        pack(s[2 * n + 1][0], s[2 * n + 1][1]), pack(s[2 * n + 1][2], s[2 * n + 1][3])};
            for (int d = 0; d < HEAD_DIM / 16; d++) {
                u32 b[4];
                load_tiles_transposed(b, shared_address(&tile_v[n * 16 + lane % 16][d * 16 + lane / 16 * 8]));
                mma(out[2 * d], p, b[0], b[1]);
                mma(out[2 * d + 1], p, b[2], b[3]);
            }
        }
        __syncthreads();
        start_copy(tile_v, v, v_row, first_key + KEYS, S), commit();
    }

    // Normalise and write (A1:12-15). A row that saw no key has l = 0: zeros, and L = -inf.
    // lse is (B, H, T); o lies in memory as (B, T, H, HEAD_DIM), so that merging the heads is a view.
    for (int half = 0; half < 2; half++) {
        int row = half ? row1 : row0;
        float sum = row_sum(l[half]), inverse = sum > 0.f ? 1.f / sum : 0.f;
        if (row >= T) continue;
        if (pair == 0) lse[((long long)batch * heads + head) * T + row] = sum > 0.f ? (m[half] + log2f(sum)) / LOG2E : -1.f / 0.f;
        for (int n = 0; n < HEAD_DIM / 8; n++)
            *(u32*)&o[(((long long)batch * T + row) * heads + head) * HEAD_DIM + n * 8 + pair * 2] =
                pack(out[n][2 * half] * inverse, out[n][2 * half + 1] * inverse);
    }
}
