// Products with quantised matrices of a GGUF file, whose bytes are read as they lie in the file:
//
//     y[m][n] = sum over k of x[m][k] * W[n][k]
//
// Inputs become integers of 16 bits, with one scale for 32 columns. LANES outputs are a tile, an
// output a lane: their codes are brought side by side, so that a sum over a group of columns needs
// no sum across lanes. This is paid once for all rows of x. Codes and inputs are pairs of int16:
// their product (pmaddwd, vpdpwssd) is in every x86 since 2013, takes codes of 8 bits without
// saturation, and does the work of two products of int8, which so many bits of input would need.
//
// The order of additions depends on neither rows nor threads: a row gives the same bits in any
// company. Integers are exact, so processors that fuse multiplication and addition agree as well.
//
// Sizes are checked by the caller.

#include "quantised_blocks.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int BLOCK = 32;             // columns that share a scale of the inputs
constexpr int CHUNK = 256;            // columns decoded at a time: 8 KB of codes
constexpr int MOST_ROWS = 256;        // at a time, and
constexpr int INPUT_BYTES = 1 << 20;  // of their integers, for the second cache to hold

struct Job {
    const float* x;
    float* y;
    Long rows, columns, width;  // width: outputs of all matrices
    const Byte* const* data;    // matrices of one type, whose outputs follow one another
    const Long* counts;
    int matrices, run;
    Word* words;
    std::atomic<Long> next;
};

// Up to ROWS rows of inputs, column by column and a row beside the other: pairs of integers; scales
// of blocks; for each group the sum of its integers times -ZERO, or of what they stand for (float).
struct Inputs {
    Long rows = 1;  // as laid out: a power of two, the last row repeated
    Word *pairs, *scales, *sums;

    Inputs(const Job& job, Long first, Long column, int group) {
        while (rows < std::min<Long>(ROWS, job.rows - first)) rows *= 2;
        const Long halves = job.columns / 2, blocks = job.columns / BLOCK;
        Word* set = job.words + first * (halves + blocks + job.columns / group);
        pairs = set + column / 2 * rows;
        scales = set + (halves + column / BLOCK) * rows;
        sums = set + (halves + blocks + column / group) * rows;
    }
};

// One block of row r.
template <class Kind>
inline void quantise_block(const float* x, const Inputs& in, Long r, Long block) {
    constexpr int GROUP = Kind::GROUP;
    Word top = 0, q[BLOCK];
    for (int k = 0; k < BLOCK; k++) top = std::max(top, bits<Word>(x[k]) & 0x7fffffff);
    // The inverse of less than 1e-30 may overflow: that counts as zero. Infinity and NaN make the
    // row NaN, where an integer would hide them.
    const float most = bits<float>(top);
    const bool fits = most >= 1e-30f && top < 0x7f800000;
    const float inverse = fits ? 32767 / most : 0;
    const float scale = fits ? most / 32767 : most < 1e-30f ? 0 : most - most;
    for (int k = 0; k < BLOCK; k++) {  // adding 1.5 * 2**23 rounds to an integer
        q[k] = bits<Word>((fits ? x[k] : 0) * inverse + 0x1.8p23f) - 0x4b400000;
    }
    for (int v = 0; v < BLOCK / 2; v++) {
        const int k = v / 2 * 4 + v % 2;
        in.pairs[(block * BLOCK / 2 + v) * in.rows + r] = (q[k] & 0xffff) | q[k + 2] << 16;
    }
    in.scales[block * in.rows + r] = bits<Word>(scale);
    for (int g = 0; g < BLOCK / GROUP; g++) {
        const Word sum = std::accumulate(q + g * GROUP, q + (g + 1) * GROUP, Word(0));
        in.sums[(block * BLOCK / GROUP + g) * in.rows + r] =
            Kind::OFFSET ? bits<Word>(scale * float(std::int32_t(sum))) : sum * -Kind::ZERO;
    }
}

template <class Kind>
void quantise(void* data) {
    Job& job = *static_cast<Job*>(data);
    for (Long first; (first = job.next.fetch_add(ROWS)) < job.rows;) {
        const Inputs in(job, first, 0, Kind::GROUP);
        for (Long r = 0; r < in.rows; r++) {
            const float* x = job.x + std::min(first + r, job.rows - 1) * job.columns;
            for (Long block = 0; block < job.columns / BLOCK; block++, x += BLOCK) {
                quantise_block<Kind>(x, in, r, block);
            }
        }
    }
}

struct Tile {  // up to CHUNK columns
    U32 codes[CHUNK / 2];
    F32 scales[CHUNK / 16], offsets[CHUNK / 16];
};

template <int R, int GROUP, bool OFFSET>
void multiply(const Tile& tile, Long groups, const Inputs& in, F32* totals) {
    // A product waits for the sum before it: with few rows there are several sums.
    constexpr int SUMS = R < ROWS ? std::min(4, ROWS / R) : 1;
    F32 total[R];
    for (int r = 0; r < R; r++) total[r] = totals[r];
    for (Long g = 0; g < groups; g++) {
        const U32* codes = tile.codes + g * (GROUP / 2);
        const Word *pairs = in.pairs + g * (GROUP / 2) * R, *sums = in.sums + g * R;
        I32 sum[SUMS][R] = {};
        for (int r = 0; r < R && !OFFSET; r++) sum[0][r] += std::int32_t(sums[r]);
#pragma GCC unroll 16
        for (int v = 0; v < GROUP / 2; v++) {
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                sum[v % SUMS][r] = dot(sum[v % SUMS][r], codes[v], pairs[v * R + r]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            for (int s = 1; s < SUMS; s++) sum[0][r] += sum[s][r];
            const float scale = bits<float>(in.scales[g * GROUP / BLOCK * R + r]);
            total[r] += number(U32(sum[0][r])) * scale * tile.scales[g];
            if (OFFSET) total[r] += tile.offsets[g] * bits<float>(sums[r]);
        }
    }
    for (int r = 0; r < R; r++) totals[r] = total[r];
}

// y[m][skip...] of LANES outputs, for all rows.
template <class Kind>
void tile(const Job& job, const Byte* weights, int skip, float* y) {
    constexpr int GROUP = Kind::GROUP, GROUPS = Kind::COLUMNS / GROUP;
    const Long stride = job.columns / Kind::COLUMNS * Kind::BYTES;
    const Byte* next = weights + LANES * stride;
    Tile tile;
    F32 totals[MOST_ROWS];
    std::fill_n(totals, (job.rows + ROWS - 1) / ROWS * ROWS, F32{});
    for (Long column = 0; column < job.columns; column += CHUNK) {
        const Long width = std::min<Long>(CHUNK, job.columns - column);
        for (int b = 0; b < width / Kind::COLUMNS; b++, weights += Kind::BYTES) {
            // Ask for the next tile in the order it lies: so many short runs are not foreseen.
            for (int i = 0; i < LANES * Kind::BYTES; i += 64) __builtin_prefetch(next + i, 0, 2);
            next += LANES * Kind::BYTES;
            Kind::decode(weights, stride, tile.codes + b * (Kind::COLUMNS / 2),
                         tile.scales + b * GROUPS, tile.offsets + b * GROUPS);
        }
        for (Long first = 0; first < job.rows; first += ROWS) {
            const Inputs in(job, first, column, GROUP);
            const auto by = in.rows == 1   ? multiply<1, GROUP, Kind::OFFSET>
                            : in.rows == 2 ? multiply<2, GROUP, Kind::OFFSET>
                            : in.rows == 4 ? multiply<4, GROUP, Kind::OFFSET>
                                           : multiply<ROWS, GROUP, Kind::OFFSET>;
            by(tile, width / GROUP, in, totals + first);
        }
    }
    for (Long m = 0; m < job.rows; m++) {
        const char* from = reinterpret_cast<const char*>(&totals[m]);
        std::memcpy(y + m * job.width + skip, from + 4 * skip, 4 * (LANES - skip));
    }
}

template <class Kind>
void tiles(void* data) {
    Job& job = *static_cast<Job*>(data);
    const Long row_bytes = job.columns / Kind::COLUMNS * Kind::BYTES;
    for (;;) {
        const Long begin = job.next.fetch_add(job.run), end = begin + job.run;
        Long before = 0, column = 0;  // tiles and outputs of the matrices before
        for (int i = 0; i < job.matrices; i++) {
            const Long count = job.counts[i], here = (count + LANES - 1) / LANES;
            for (Long t = std::max(begin, before); t < std::min(end, before + here); t++) {
                // The last tile of a matrix begins among outputs of the one before it.
                const Long n = (t - before) * LANES, from = std::min(n, count - LANES);
                const Byte* weights = job.data[i] + from * row_bytes;
                tile<Kind>(job, weights, int(n - from), job.y + column + from);
            }
            before += here, column += count;
        }
        if (begin >= before) return;
    }
}

// -------------------------------------------------------------------------------------- threads

// GOMP_parallel, the same since GCC 4.9 and in LLVM's OpenMP: the pool that the rest of the program
// uses, so that no second one spins beside it.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

void everywhere(Parallel parallel, int threads, void (*work)(void*), Job& job) {
    job.next = 0;
    if (threads > 1 && parallel) return parallel(work, &job, unsigned(threads), 0);
    std::vector<std::thread> others;
    try {
        while (int(others.size()) + 1 < threads) others.emplace_back(work, &job);
    } catch (const std::system_error&) {  // fewer will do
    }
    work(&job);
    for (auto& other : others) other.join();
}

template <class Kind>
int product(Job& job, Parallel parallel, int threads) {
    const Long fit = INPUT_BYTES / (2 * job.columns) / ROWS * ROWS, all = job.rows;
    const Long most = std::clamp<Long>(fit, 4 * ROWS, MOST_ROWS);
    const Long held = (std::min(all, most) + ROWS - 1) / ROWS * ROWS;
    const Long per_row = job.columns / 2 + job.columns / BLOCK + job.columns / Kind::GROUP;
    const std::unique_ptr<Word[]> words(new (std::nothrow) Word[held * per_row]);
    if (!(job.words = words.get())) return 2;
    for (Long first = 0; first < all; first += most) {
        job.rows = std::min(most, all - first);
        everywhere(parallel, job.rows > 2 * ROWS ? threads : 1, quantise<Kind>, job);
        everywhere(parallel, threads, tiles<Kind>, job);
        job.x += job.rows * job.columns, job.y += job.rows * job.width;
    }
    return 0;
}

// ------------------------------------------------------------------------------- whole matrices

struct Rows {
    const Byte* data;
    Long rows, columns;
    void* out;  // rows one after the other: float, or its upper half
    bool halves;
    std::atomic<Long> next;
};

// The upper half of a float, rounded to even. NaN stays NaN.
inline std::uint16_t upper_half(float x) {
    const Word word = bits<Word>(x);
    if ((word & 0x7fffffff) > 0x7f800000) return std::uint16_t(word >> 16 | 0x40);
    return std::uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

template <class Kind>
void dequantise(void* data) {
    Rows& job = *static_cast<Rows*>(data);
    constexpr int COLUMNS = Kind::COLUMNS, GROUP = Kind::GROUP;
    const Long stride = job.columns / COLUMNS * Kind::BYTES;
    const Long tiles = (job.rows + LANES - 1) / LANES;
    for (Long t; (t = job.next.fetch_add(1)) < tiles;) {
        const Long first = std::min(t * LANES, job.rows - LANES);  // the last overlaps
        const Byte* blocks = job.data + first * stride;
        for (Long column = 0; column < job.columns; column += COLUMNS, blocks += Kind::BYTES) {
            U32 codes[COLUMNS / 2];
            F32 scales[COLUMNS / GROUP], offsets[COLUMNS / GROUP];
            alignas(64) float values[COLUMNS][LANES];
            Kind::decode(blocks, stride, codes, scales, offsets);
            for (int v = 0; v < COLUMNS / 2; v++) {
                const int k = v / 2 * 4 + v % 2, group = k / GROUP;
                for (int half = 0; half < 2; half++) {
                    const U32 code = half ? codes[v] >> 16 : codes[v] & 0xffff;
                    F32 value = number(Kind::OFFSET ? code : code - Kind::ZERO) * scales[group];
                    if (Kind::OFFSET) value += offsets[group];
                    std::memcpy(values[k + 2 * half], &value, sizeof value);
                }
            }
            for (int n = 0; n < LANES; n++) {
                const Long at = (first + n) * job.columns + column;
                if (job.halves) {
                    auto* out = static_cast<std::uint16_t*>(job.out) + at;
                    for (int k = 0; k < COLUMNS; k++) out[k] = upper_half(values[k][n]);
                } else {
                    auto* out = static_cast<float*>(job.out) + at;
                    for (int k = 0; k < COLUMNS; k++) out[k] = values[k][n];
                }
            }
        }
    }
}

template <class Kind>
int whole(Rows& job, Parallel parallel, int threads) {
    if (threads > 1 && parallel) parallel(dequantise<Kind>, &job, unsigned(threads), 0);
    else dequantise<Kind>(&job);
    return 0;
}

// `call` with the type of this number in GGUF, 1 for an unknown one.
template <class Call>
int of_type(int type, Call call) {
    switch (type) {
        case 2: return call(Plain<false, false>());
        case 3: return call(Plain<true, false>());
        case 6: return call(Plain<false, true>());
        case 7: return call(Plain<true, true>());
        case 8: return call(Q8_0());
        case 10: return call(Q2_K());
        case 11: return call(Q3_K());
        case 12: return call(K45<false>());
        case 13: return call(K45<true>());
        case 14: return call(Q6_K());
        case 15: return call(Q8_K());
        case 20: return call(IQ4_NL());
        case 23: return call(IQ4_XS());
        case 39: return call(MXFP4());
    }
    return 1;
}

}  // namespace

extern "C" int khaosz_level() { return LEVEL; }

// y (rows, sum of counts) from x (rows, columns) and matrices (count >= 16, columns) of one type,
// by its number in GGUF. Returns 0, 1 for an unknown type, 2 when out of memory.
extern "C" int khaosz_multiply(int type, const float* x, Long rows, Long columns,
                               const Byte* const* data, const Long* counts, int matrices, float* y,
                               Parallel parallel, int threads) {
    const Long width = std::accumulate(counts, counts + matrices, Long(0));
    if (rows * columns * width < 1 << 18) threads = 1;
    // Runs of tiles are runs of memory; but the last run must not keep a thread waiting for long.
    const int run = int(std::clamp<Long>(width / LANES / (16 * threads), 1, 8));
    Job job{x, y, rows, columns, width, data, counts, matrices, run, nullptr, {0}};
    return of_type(type, [&](auto kind) { return product<decltype(kind)>(job, parallel, threads); });
}

// The matrix (rows >= 16, columns) of a type as numbers: float, or with `halves` bfloat16. Returns
// 0, or 1 for an unknown type.
extern "C" int khaosz_dequantise(int type, const Byte* data, Long rows, Long columns, void* out,
                                 int halves, Parallel parallel, int threads) {
    Rows job{data, rows, columns, out, halves != 0, {0}};
    return of_type(type, [&](auto kind) { return whole<decltype(kind)>(job, parallel, threads); });
}
