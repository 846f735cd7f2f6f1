// Sums over experts by way of the workspace: the parts of all assignments [T*K, columns] that a product leaves there,
// added up for each token in the order of its slots, a chunk of columns at a time.
#pragma once

#include <algorithm>

#include "ops/moe/moe_args.h"

namespace kestrel::cuda {

// How many columns of parts of this type the workspace holds.
inline int64_t columns_of_parts(const MoeArgs& a, DType dtype) {
  const int64_t column = size_of(dtype) * a.assignments();
  return column == 0 ? a.width : std::min(a.width, a.workspace->shape[0] / column);
}

// Columns [first, first + columns) of `a` as a product without a sum, into the workspace.
inline MoeArgs product_to_parts(const MoeArgs& a, DType dtype, int64_t first, int64_t columns) {
  MoeArgs product = a;
  product.reduce = false;
  product.out = Tensor(a.workspace->data, dtype, {a.assignments(), columns}, a.out.device);
  product.out_rows = {a.assignments(), a.assignments(), columns, 0};
  product.panel[0] = from_row(a.panel[0], first, a.dtype);
  product.width = columns;
  return product;
}

// Which parts there are the routing says, or else a mark that no product has written over.
void mark_parts(Stream stream, const MoeArgs& product);
void sum_parts(Stream stream, const MoeArgs& a, const MoeArgs& product, int64_t first);

template <class Product>
void sum_of_parts(Stream stream, const MoeArgs& a, DType dtype, int64_t most_columns, const Product& product) {
  for (int64_t first = 0; first < a.width; first += most_columns) {
    const MoeArgs chunk = product_to_parts(a, dtype, first, std::min(most_columns, a.width - first));
    if (!a.ids) mark_parts(stream, chunk);
    product(chunk);
    sum_parts(stream, a, chunk, first);
  }
}

}  // namespace kestrel::cuda
