// The index arithmetic of upfirdn2d, for host and device.
//
// Let z be a plane of x with up - 1 zeros after each pixel. An output pixel at row y is the sum of
// z over rows first .. first + taps - 1, first = y * down - pad, weighted by the flipped filter;
// columns likewise. Only rows of z that are multiples of up hold pixels, so row i of x meets the
// tap i * up - first where that lies in 0 .. taps - 1.

#pragma once

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace pfgm {

// Every pair is (vertical, horizontal).
struct Resampling {
  long long planes;  // batch times channels
  int in[2], out[2], taps[2], up[2], down[2];
  int pad[2];  // zeros before the first pixel, negative to crop
};

template <typename To, typename From>
HOST_DEVICE To convert(From value) {
  return static_cast<To>(value);
}

// The largest integer not above a / b, for b > 0.
HOST_DEVICE inline int floor_div(int a, int b) { return a / b - (a % b < 0); }

HOST_DEVICE inline bool inside(int i, int size) { return 0 <= i && i < size; }

// One output pixel, for any filter and factors.
template <typename A, typename T>
HOST_DEVICE A pixel(const T* plane, const A* filter, const Resampling& r, int y, int x) {
  int first[2] = {y * r.down[0] - r.pad[0], x * r.down[1] - r.pad[1]};
  int begin[2], end[2];
  for (int axis = 0; axis < 2; ++axis) {
    begin[axis] = floor_div(first[axis] + r.up[axis] - 1, r.up[axis]);
    end[axis] = floor_div(first[axis] + r.taps[axis] - 1, r.up[axis]) + 1;
    begin[axis] = begin[axis] < 0 ? 0 : begin[axis];
    end[axis] = end[axis] > r.in[axis] ? r.in[axis] : end[axis];
  }
  A sum = 0;
  for (int i = begin[0]; i < end[0]; ++i) {
    const A* row = filter + (r.taps[0] - 1 - (i * r.up[0] - first[0])) * r.taps[1];
    for (int j = begin[1]; j < end[1]; ++j) {
      sum += row[r.taps[1] - 1 - (j * r.up[1] - first[1])] * convert<A>(plane[i * r.in[1] + j]);
    }
  }
  return sum;
}

// ROWS output pixels, one below the other, for filters of TAPS x TAPS and factors that are the same
// for both axes. All loops have constant bounds, so that taps and sums live in registers; each
// pixel of x is read once for the ROWS outputs that it meets.
//
// Only taps of the filter that meet pixels of x take part in a sum: a padded zero times an infinity
// would make it NaN.
template <typename A, int UP, int DOWN, int TAPS, int ROWS>
struct Strip {
  // Which row of x meets which tap depends on first modulo UP. The rows of taps are therefore
  // shifted by it, after which the indices are constants; shifted rows may lie outside the filter.
  static constexpr int TAP_ROWS = TAPS + UP - 1;
  static constexpr int COLUMNS = TAPS / UP;
  static constexpr int IN_ROWS = ((ROWS - 1) * DOWN + TAP_ROWS - 1) / UP + 1;
  static_assert(TAPS % UP == 0, "every place must meet as many columns");

  A taps[TAP_ROWS][COLUMNS];
  int top, left;  // the first pixel of x that is met
  int shift;      // row k of `taps` is row k + shift of the flipped filter

  HOST_DEVICE Strip(const A* filter, const Resampling& r, int y, int x) {
    const int first_row = y * DOWN - r.pad[0];
    const int first_column = x * DOWN - r.pad[1];
    top = floor_div(first_row, UP);
    left = floor_div(first_column + UP - 1, UP);
    shift = top * UP - first_row;
#pragma unroll
    for (int k = 0; k < TAP_ROWS; ++k) {
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        const int row = TAPS - 1 - (k + shift);
        const int column = TAPS - 1 - ((left + j) * UP - first_column);
        const bool met = inside(row, TAPS) && inside(left + j, r.in[1]);
        taps[k][j] = met ? filter[row * TAPS + column] : A(0);
      }
    }
  }

  template <typename T>
  HOST_DEVICE void run(const T* plane, const Resampling& r, A (&sum)[ROWS]) const {
#pragma unroll
    for (int row = 0; row < ROWS; ++row) sum[row] = 0;
#pragma unroll
    for (int i = 0; i < IN_ROWS; ++i) {
      if (!inside(top + i, r.in[0])) continue;
      A pixels[COLUMNS];
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        // In columns outside x both factors are 0.
        pixels[j] = inside(left + j, r.in[1])
                        ? convert<A>(plane[(top + i) * r.in[1] + left + j])
                        : A(0);
      }
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        const int k = i * UP - row * DOWN;
        if (!inside(k, TAP_ROWS) || (UP > 1 && !inside(k + shift, TAPS))) continue;
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) sum[row] += taps[k][j] * pixels[j];
      }
    }
  }
};

}  // namespace pfgm
