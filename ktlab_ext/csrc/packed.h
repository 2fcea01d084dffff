/* The packed layout: the same quantized values, cut into panels of 16 rows so that 64 bytes hold
 * four columns of 16 rows. That is at once the operand of VPDPBUSD (16 sums at a time) and, 16 such
 * vectors together, the B tile of TDPB*D (64 columns of 16 rows).
 *
 * A matrix (N x K) is ceil(N/16) panels, one after the other. A panel is
 *     head    int8_channel only: float32 scale[16]
 *     chunks  of KTL_CHUNK = 256 columns; the last one holds the rest, rounded up to 32
 * A chunk of G groups of 32 columns is, in this order, without gaps, and padded with zeros to a
 * multiple of 64 bytes:
 *     codes   G times: base plane, then high plane (if the format has one)
 *     scale   [sub][16] one byte each (see the table; absent where "-")
 *     min     [sub][16] one byte each (Q4_K, Q5_K)
 *     d       [n][16] float16, n = 1 a chunk for the 256-blocks, G for the 32-blocks, ceil(G/4) for
 *             int4_group128
 *     dmin    [16] float16 (Q2_K, Q4_K, Q5_K)
 * A group's code vector v (0..7, 64 bytes) holds column 4v+j of row r at byte 4r+j. Planes:
 *     8 bits  8 vectors: the code vectors
 *     4 bits  4 vectors: vector i = code vector 2i in the low nibbles, 2i+1 in the high nibbles
 *     2 bits  2 vectors: vector i holds code vector 4i+j at bits 2j, 2j+1   (j = 0..3)
 *     1 bit   1 vector:  code vector j at bit j                              (j = 0..7)
 * and code = base | high << base_bits. Codes are unsigned; value = scale * (code - zero) [- min],
 * or scale * table[code].
 *
 *     format         base high zero sub  scale byte                 file block
 *     q8_0             8   -   128  32   -   (stored code ^ 0x80)   d, 32 int8
 *     q4_0             4   -     8  32   -
 *     q5_0             4   1    16  32   -
 *     q2_k             2   -     0  16   as in the file: low nibble scale, high nibble min
 *     q3_k             2   1     4  16   int8, the file's 6 bits - 32   (the file's hmask bit is the
 *                                                                    code's bit 2, uninverted)
 *     q4_k             4   -     0  32   6 bits; min 6 bits
 *     q5_k             4   1     0  32   6 bits; min 6 bits
 *     q6_k             4   2    32  16   int8, as in the file
 *     iq4_nl           4   -   table 32  -
 *     iq4_xs           4   -   table 32  int8, the file's 6 bits - 32
 *     int8_channel     8   -   128  row  -   (stored code ^ 0x80), scale in the panel's head
 *     int4_group32     4   -     8  32   -
 *     int4_group128    4   -     8  128  -
 * f32: [column][16] float32. f16, bf16: [column/2][16][2], so that 64 bytes are an operand of
 * VDPBF16PS and 16 of them a B tile of TDPBF16PS. Columns padded with zeros to 32 as above.
 * Rows beyond N and columns beyond K have code = zero (q*_k, tables: 0), scales and d = 0.
 */
#ifndef KTL_PACKED_H
#define KTL_PACKED_H

enum { KTL_PANEL = 16, KTL_CHUNK = 256, KTL_GROUP = 32 };

#endif
