// Vectors of this processor, and the block formats of GGUF brought into them: codes of LANES rows
// side by side, in pairs of int16. Formats: ggml-common.h of llama.cpp, gguf_blocks.py. Needs the
// vector types of GCC and Clang, and little-endian memory.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(KHAOSZ_PLAIN)  // tests compare the other ways with this one
constexpr int LANES = 4, ROWS = 8, LEVEL = 0;
#elif defined(__AVX512BW__)
#include <immintrin.h>
#define SIMD(name) _mm512_##name
using Register = __m512i;
constexpr int LANES = 16, ROWS = 8, LEVEL = 3;
#elif defined(__AVX2__)
#include <immintrin.h>
#define SIMD(name) _mm256_##name
using Register = __m256i;
constexpr int LANES = 8, ROWS = 4, LEVEL = 2;  // of 16 registers, sums and totals take 8
#elif defined(__ARM_NEON)
constexpr int LANES = 4, ROWS = 8, LEVEL = 1;
#else
constexpr int LANES = 4, ROWS = 4, LEVEL = 0;
#endif

namespace {

using Byte = std::uint8_t;
using Word = std::uint32_t;
using Long = std::int64_t;
using U16 = std::uint16_t __attribute__((vector_size(4 * LANES)));
using U32 = std::uint32_t __attribute__((vector_size(4 * LANES)));
using I32 = std::int32_t __attribute__((vector_size(4 * LANES)));
using F32 = float __attribute__((vector_size(4 * LANES)));

template <class To, class From>
inline To bits(From from) {
    To to;
    static_assert(sizeof to == sizeof from);
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// ---------------------------------------------------------------------- where processors differ

// a + codes * inputs, pairs of int16 in every lane.
inline I32 dot(I32 a, U32 codes, Word inputs) {
#if !defined(SIMD)
    const std::int32_t first = std::int16_t(inputs & 0xffff), second = std::int32_t(inputs) >> 16;
    return a + I32(codes & 0xffff) * first + I32(codes >> 16) * second;
#else
    const Register pair = SIMD(set1_epi32)(int(inputs));
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
    return I32(_mm512_dpwssd_epi32(Register(a), Register(codes), pair));
#elif !defined(__AVX512BW__) && defined(__AVXVNNI__)
    return I32(_mm256_dpwssd_avx_epi32(Register(a), Register(codes), pair));
#else
    return a + I32(SIMD(madd_epi16)(Register(codes), pair));
#endif
#endif
}

// Four bytes at p of every output; their rows are `stride` apart.
inline U32 bytes4(const Byte* p, Long stride) {
    U32 out{};
    for (int n = 0; n < LANES; n++) {
#if defined(SIMD)
        out[n] = Word(n * stride);
    }
#if defined(__AVX512BW__)
    return U32(_mm512_i32gather_epi32(Register(out), p, 1));
#else
    return U32(_mm256_i32gather_epi32(reinterpret_cast<const int*>(p), Register(out), 1));
#endif
#else
        Word word;
        std::memcpy(&word, p + n * stride, 4);
        out[n] = word;
    }
    return out;
#endif
}

// Sixteen bytes at p of every output, as four vectors.
inline void bytes16(const Byte* p, Long stride, U32 out[4]) {
#if !defined(SIMD)
    for (int j = 0; j < 4; j++) out[j] = bytes4(p + 4 * j, stride);
#else
    Register r[4];
    for (int i = 0; i < 4; i++, p += stride) {
        const auto row = [&](int n) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + n * stride));
        };
#if defined(__AVX512BW__)
        r[i] = _mm512_inserti32x4(_mm512_castsi128_si512(row(0)), row(4), 1);
        r[i] = _mm512_inserti32x4(_mm512_inserti32x4(r[i], row(8), 2), row(12), 3);
#else
        r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(4), 1);
#endif
    }
    const auto a = SIMD(unpacklo_epi32)(r[0], r[1]), b = SIMD(unpacklo_epi32)(r[2], r[3]);
    const auto c = SIMD(unpackhi_epi32)(r[0], r[1]), d = SIMD(unpackhi_epi32)(r[2], r[3]);
    out[0] = U32(SIMD(unpacklo_epi64)(a, b)), out[1] = U32(SIMD(unpackhi_epi64)(a, b));
    out[2] = U32(SIMD(unpacklo_epi64)(c, d)), out[3] = U32(SIMD(unpackhi_epi64)(c, d));
#endif
}

// -------------------------------------------------------------------------------- block formats
// weight = (code - ZERO) * scale, or code * scale + offset, in groups of GROUP columns

inline F32 number(U32 x) { return __builtin_convertvector(I32(x), F32); }

// Half-precision numbers. A product with 2**112 moves the exponent, of subnormal numbers as well;
// infinity and NaN keep the largest.
inline F32 half(U32 x) {
    const F32 moved = F32((x & 0x7fff) << 13) * 0x1p112f;
    const U32 special = U32((x & 0x7c00) == 0x7c00) & 0x7f800000;
    return F32(U32(moved) | special | (x & 0x8000) << 16);
}

// Codes of columns 4 * slot and on, a byte each. Pairs are the columns (0, 2) and (1, 3) of four:
// what a mask and a shift leave.
inline void put(U32* codes, int slot, U32 bytes) {
    codes[2 * slot] = bytes & 0x00ff00ff;
    codes[2 * slot + 1] = U32(U16(bytes) >> 8);
}

// Low and high halves of bytes, `apart` slots apart.
inline void put(U32* codes, int slot, int apart, U32 halves) {
    codes[2 * slot] = halves & 0x000f000f;
    codes[2 * slot + 1] = halves >> 8 & 0x000f000f;
    codes[2 * (slot + apart)] = halves >> 4 & 0x000f000f;
    codes[2 * (slot + apart) + 1] = U32(U16(halves) >> 12);
}

// With further bits of each in the bytes of `low` and `high`.
inline void put(U32* codes, int slot, int apart, U32 halves, U32 low, U32 high) {
    put(codes, slot, (halves & 0x0f0f0f0f) | low << 4);
    put(codes, slot + apart, (halves >> 4 & 0x0f0f0f0f) | high << 4);
}

// Four bits from bit `at` on, one to a byte.
inline U32 spread(U32 x, int at) {
    const U32 four = x >> at & 15;
    return (four | four << 7 | four << 14 | four << 21) & 0x01010101;
}

// What 4-bit codes mean, plus 128: IQ4_NL and IQ4_XS; MXFP4, whose numbers are doubled.
alignas(16) constexpr Byte IQ4[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                      129, 141, 153, 166, 181, 197, 217, 241};
alignas(16) constexpr Byte FP4[16] = {128, 129, 130, 131, 132, 134, 136, 140,
                                      128, 127, 126, 125, 124, 122, 120, 116};

// The numbers that bytes below 16 mean.
inline U32 meant(const Byte* numbers, U32 bytes) {
#if defined(__AVX512BW__) && defined(SIMD)
    const auto table = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)numbers));
    return U32(_mm512_shuffle_epi8(table, Register(bytes)));
#elif defined(SIMD)
    const auto table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)numbers));
    return U32(_mm256_shuffle_epi8(table, Register(bytes)));
#else
    Byte each[sizeof bytes];
    std::memcpy(each, &bytes, sizeof bytes);
    for (Byte& byte : each) byte = numbers[byte];
    std::memcpy(&bytes, each, sizeof bytes);
    return bytes;
#endif
}

// 32 columns in 16 bytes at p: low halves, then high ones.
inline void put_meant(U32* codes, int slot, const Byte* numbers, const Byte* p, Long stride) {
    U32 words[4];
    bytes16(p, stride, words);
    for (int j = 0; j < 4; j++) {
        put(codes, slot + j, meant(numbers, words[j] & 0x0f0f0f0f));
        put(codes, slot + j + 4, meant(numbers, words[j] >> 4 & 0x0f0f0f0f));
    }
}

template <bool MINIMUM, bool FIVE>
struct Plain {  // Q4_0, Q4_1, Q5_0, Q5_1
    static constexpr int COLUMNS = 32, GROUP = 32, ZERO = FIVE ? 16 : 8;
    static constexpr int HEAD = MINIMUM ? 4 : 2, BYTES = HEAD + (FIVE ? 4 : 0) + 16;
    static constexpr bool OFFSET = MINIMUM;

    static void decode(const Byte* p, Long stride, U32* codes, F32* scale, F32* offset) {
        const U32 head = bytes4(p, stride), fifth = FIVE ? bytes4(p + HEAD, stride) : U32{};
        *scale = half(head);
        if (OFFSET) *offset = half(head >> 16);
        U32 words[4];
        bytes16(p + BYTES - 16, stride, words);
        for (int j = 0; j < 4; j++) {
            if (!FIVE) put(codes, j, 4, words[j]);
            else put(codes, j, 4, words[j], spread(fifth, 4 * j), spread(fifth, 4 * j + 16));
        }
    }
};

struct Q8_0 {
    static constexpr int COLUMNS = 32, GROUP = 32, ZERO = 128, BYTES = 34;
    static constexpr bool OFFSET = false;

    static void decode(const Byte* p, Long stride, U32* codes, F32* scale, F32*) {
        *scale = half(bytes4(p, stride));
        U32 words[8];
        bytes16(p + 2, stride, words);
        bytes16(p + 18, stride, words + 4);
        for (int j = 0; j < 8; j++) put(codes, j, words[j] ^ 0x80808080);
    }
};

struct IQ4_NL {
    static constexpr int COLUMNS = 32, GROUP = 32, ZERO = 128, BYTES = 18;
    static constexpr bool OFFSET = false;

    static void decode(const Byte* p, Long stride, U32* codes, F32* scale, F32*) {
        *scale = half(bytes4(p, stride));
        put_meant(codes, 0, IQ4, p + 2, stride);
    }
};

struct MXFP4 {
    static constexpr int COLUMNS = 32, GROUP = 32, ZERO = 128, BYTES = 17;
    static constexpr bool OFFSET = false;

    static void decode(const Byte* p, Long stride, U32* codes, F32* scale, F32*) {
        const U32 power = bytes4(p, stride) & 0xff, small = U32(power < 2);  // 2**(power - 128)
        *scale = F32((small & 0x200000 << (power & 1)) | (~small & (power - 1) << 23));
        put_meant(codes, 0, FP4, p + 1, stride);
    }
};

struct IQ4_XS {
    static constexpr int COLUMNS = 256, GROUP = 32, ZERO = 128, BYTES = 136;
    static constexpr bool OFFSET = false;

    static void decode(const Byte* p, Long stride, U32* codes, F32* scale, F32*) {
        const U32 head = bytes4(p, stride), low = bytes4(p + 4, stride);
        const F32 unit = half(head);
        for (int g = 0; g < 8; g++) {  // factors of 6 bits, the highest two apart
            const U32 factor = (low >> 4 * g & 15) | (head >> (16 + 2 * g) & 3) << 4;
            scale[g] = unit * number(factor - 32);
            put_meant(codes, 8 * g, IQ4, p + 8 + 16 * g, stride);
        }
    }
};

// Columns of 64 bytes at p, two bits each: 32 bytes are 128 columns, the lowest bits first. Bit i
// of the bytes in `third` is the third bit of the 32 columns from 32 * i on.
inline void put_quarters(U32* codes, const Byte* p, Long stride, const U32* third) {
    U32 words[4];
    for (int i = 0; i < 4; i++) {
        bytes16(p + 16 * i, stride, words);
        for (int s = 0; s < 4; s++) {
            for (int j = 0; j < 4; j++) {
                const int part = i / 2 * 4 + s, word = 4 * (i % 2) + j;
                const U32 more = third ? third[word] >> part & 0x01010101 : U32{};
                put(codes, 8 * part + word, (words[j] >> 2 * s & 0x03030303) | more << 2);
            }
        }
    }
}

struct Q2_K {
    static constexpr int COLUMNS = 256, GROUP = 16, ZERO = 0, BYTES = 84;
    static constexpr bool OFFSET = true;

    static void decode(const Byte* p, Long stride, U32* codes, F32* scale, F32* offset) {
        const U32 head = bytes4(p + 80, stride);
        const F32 unit = half(head), minimum = -half(head >> 16);
        U32 factors[4];
        bytes16(p, stride, factors);
        for (int g = 0; g < 16; g++) {
            const U32 factor = factors[g / 4] >> 8 * (g % 4);
            scale[g] = unit * number(factor & 15), offset[g] = minimum * number(factor >> 4 & 15);
        }
        put_quarters(codes, p + 16, stride, nullptr);
    }
};

struct Q3_K {
    static constexpr int COLUMNS = 256, GROUP = 16, ZERO = 4, BYTES = 110;
    static constexpr bool OFFSET = false;

    static void decode(const Byte* p, Long stride, U32* codes, F32* scale, F32*) {
        const F32 unit = half(bytes4(p + 106, stride) >> 16);
        U32 factors[4], third[8];
        bytes16(p + 94, stride, factors);  // from two bytes before: 16 of them end at the block's
        const U32 low[2] = {factors[0] >> 16 | factors[1] << 16, factors[1] >> 16 | factors[2] << 16};
        const U32 high = factors[2] >> 16 | factors[3] << 16;
        for (int g = 0; g < 16; g++) {
            const U32 four = low[g / 4 % 2] >> (8 * (g % 4) + g / 8 * 4) & 15;
            const U32 two = high >> (8 * (g % 4) + g / 4 * 2) & 3;
            scale[g] = unit * number((four | two << 4) - 32);
        }
        bytes16(p, stride, third);
        bytes16(p + 16, stride, third + 4);
        put_quarters(codes, p + 32, stride, third);
    }
};

struct Q8_K {
    static constexpr int COLUMNS = 256, GROUP = 32, ZERO = 128, BYTES = 292;
    static constexpr bool OFFSET = false;

    static void decode(const Byte* p, Long stride, U32* codes, F32* scale, F32*) {
        for (int g = 0; g < 8; g++) scale[g] = F32(bytes4(p, stride));
        U32 words[4];
        for (int i = 0; i < 16; i++) {
            bytes16(p + 4 + 16 * i, stride, words);
            for (int j = 0; j < 4; j++) put(codes, 4 * i + j, words[j] ^ 0x80808080);
        }
    }
};

template <bool FIVE>
struct K45 {  // Q4_K, Q5_K
    static constexpr int COLUMNS = 256, GROUP = 32, ZERO = 0, BYTES = FIVE ? 176 : 144;
    static constexpr bool OFFSET = true;

    static void decode(const Byte* p, Long stride, U32* codes, F32* scale, F32* offset) {
        U32 head[4], words[4], fifth[8];  // head: two numbers, and eight 6-bit factors of each
        bytes16(p, stride, head);
        const F32 unit = half(head[0]), minimum = -half(head[0] >> 16);
        for (int g = 0; g < 4; g++) {
            const U32 a = head[1] >> 8 * g, b = head[2] >> 8 * g, c = head[3] >> 8 * g;
            scale[g] = unit * number(a & 63), offset[g] = minimum * number(b & 63);
            scale[g + 4] = unit * number((c & 15) | (a >> 2 & 48));
            offset[g + 4] = minimum * number((c >> 4 & 15) | (b >> 2 & 48));
        }
        for (int i = 0; i < 2 && FIVE; i++) bytes16(p + 16 + 16 * i, stride, fifth + 4 * i);
        for (int i = 0; i < 8; i++) {  // 32 bytes are 64 columns: low halves, then high ones
            const int pair = i / 2;
            bytes16(p + BYTES - 128 + 16 * i, stride, words);
            for (int j = 0; j < 4; j++) {
                const int slot = 16 * pair + 4 * (i % 2) + j;
                const U32 more = FIVE ? fifth[4 * (i % 2) + j] >> 2 * pair : U32{};
                if (!FIVE) put(codes, slot, 8, words[j]);
                else put(codes, slot, 8, words[j], more & 0x01010101, more >> 1 & 0x01010101);
            }
        }
    }
};

struct Q6_K {
    static constexpr int COLUMNS = 256, GROUP = 16, ZERO = 32, BYTES = 210;
    static constexpr bool OFFSET = false;

    static void decode(const Byte* p, Long stride, U32* codes, F32* scale, F32*) {
        U32 factors[4], words[4], high[4];
        const F32 unit = half(bytes4(p + 206, stride) >> 16);
        bytes16(p + 192, stride, factors);
        for (int g = 0; g < 16; g++) {
            scale[g] = unit * number(U32(I32(factors[g / 4] << (24 - 8 * (g % 4))) >> 24));
        }
        for (int i = 0; i < 8; i++) {  // twice 64 bytes for 128 columns
            const int side = i / 4, part = i % 4, shift = part / 2 * 2;
            bytes16(p + 16 * i, stride, words);
            bytes16(p + 128 + 32 * side + 16 * (part % 2), stride, high);
            for (int j = 0; j < 4; j++) {
                put(codes, 32 * side + 4 * part + j, 16, words[j], high[j] >> shift & 0x03030303,
                    high[j] >> (shift + 4) & 0x03030303);
            }
        }
    }
};

}  // namespace
