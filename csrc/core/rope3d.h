// SPDX-License-Identifier: Apache-2.0
// Rotary embedding of a sequence made of grids. The contract is in talkingdit/ops/rope3d.py.
#pragma once

#include "core/kernel.h"

namespace td {

// One row of the segment table: a grid of `end - begin` tokens, t-major, then h, then w. t_row is the first element of
// the segment's temporal rows in the cos (and sin) plane of the rotation table, h_row and w_row likewise.
struct RopeSegment {
  int64_t begin, end, height, width, t_row, h_row, w_row;
};
constexpr int kRopeSegmentFields = 7;

struct RopeArgs {
  const void* x;  // [B, N, H, D]
  void* out;
  int64_t x_strides[3], out_strides[3];
  int64_t batch, tokens, heads;
  int dim;
  int pairs[3];  // rotated pairs per axis; they sum up to dim / 2
  const void* cos;
  const void* sin;
  const RopeSegment* segments;
  int segment_count;
  int64_t token_offset;
  bool inverse, interleaved;
  DType dtype;
};

// First element of a head: `strides` are those of the batch, token and head axes.
template <class T, class Pointer>
TD_HD T* rope_head(Pointer* data, const int64_t* strides, int64_t b, int64_t n, int64_t h) {
  return static_cast<T*>(data) + b * strides[0] + n * strides[1] + h * strides[2];
}

// Where token `index` of the layout is: its segment and its place (f, y, x) in that segment's grid.
struct RopeCursor {
  const RopeSegment* segment;
  int64_t f, y, x;

  TD_HD RopeCursor(const RopeSegment* segments, int count, int64_t index) {
    int low = 0;
    for (int high = count; high - low > 1;) {
      const int middle = (low + high) / 2;
      if (segments[middle].begin <= index) {
        low = middle;
      } else {
        high = middle;
      }
    }
    segment = segments + low;
    // A layout has less than 2^31 tokens (checked where it is made): 32-bit divisions.
    const uint32_t local = uint32_t(index - segment->begin), width = uint32_t(segment->width);
    const uint32_t line = local / width, height = uint32_t(segment->height);
    f = line / height;
    y = line - uint32_t(f) * height;
    x = local - line * width;
  }

  // Moves to the next token without a division. Says how many axes moved: 1 (w), 2 (h, w) or 3 (all, perhaps a new
  // segment). Must not be called on the last token of the layout.
  TD_HD int advance() {
    if (++x < segment->width) return 1;
    x = 0;
    if (++y < segment->height) return 2;
    y = 0;
    if (segment->begin + (++f) * segment->height * segment->width >= segment->end) {
      do {
        ++segment;
      } while (segment->begin == segment->end);
      f = 0;
    }
    return 3;
  }

  // Element offset of the rotation row of an axis (0: t, 1: h, 2: w).
  TD_HD int64_t row(int axis, const int* pairs) const {
    if (axis == 0) return segment->t_row + f * pairs[0];
    if (axis == 1) return segment->h_row + y * pairs[1];
    return segment->w_row + x * pairs[2];
  }
};

TD_DECLARE_KERNEL(rope3d, const RopeArgs&)

}  // namespace td
