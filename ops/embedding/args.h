#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

struct EmbeddingArgs {
  Tensor out, table, ids;
  Rows out_rows, id_rows;  // id_rows: where each id lies, as rows of one element
  int64_t row_bytes;
};

}  // namespace kestrel
