# The TensorRT engine, where the headers are found. Nothing is linked: TensorRT and the driver are loaded at run time, so a
# library with the engine runs where they are missing.
#
# Headers are looked for in TENSORRT_INCLUDE_DIR and CUDA_INCLUDE_DIR, given to CMake or in the environment, and where
# Debian's packages, JetPack and CUDA's own installer put them.
set(FRAMESTEP_TENSORRT AUTO CACHE STRING "the TensorRT engine: AUTO (where its headers are), ON or OFF")
find_path(TENSORRT_INCLUDE_DIR NvInferRuntime.h HINTS ENV TENSORRT_INCLUDE_DIR)
find_path(CUDA_INCLUDE_DIR cuda.h HINTS ENV CUDA_INCLUDE_DIR PATHS /usr/local/cuda/include)

set(FRAMESTEP_TENSORRT_FOUND OFF)
# TensorRT's headers include the runtime's, which may lie in a package of its own
if(NOT FRAMESTEP_TENSORRT STREQUAL "OFF" AND TENSORRT_INCLUDE_DIR AND EXISTS ${CUDA_INCLUDE_DIR}/cuda.h
    AND EXISTS ${CUDA_INCLUDE_DIR}/cuda_runtime_api.h)
  file(STRINGS ${TENSORRT_INCLUDE_DIR}/NvInferVersion.h lines
    REGEX "define (NV_TENSORRT|TRT)_(MAJOR|MINOR)(_ENTERPRISE)? +[0-9]+")
  string(REGEX REPLACE ".*_MAJOR[A-Z_]* +([0-9]+).*_MINOR[A-Z_]* +([0-9]+).*" "\\1.\\2" tensorrt_version "${lines}")
  if(tensorrt_version VERSION_GREATER_EQUAL 10.15)
    set(FRAMESTEP_TENSORRT_FOUND ON)
  endif()
endif()

if(FRAMESTEP_TENSORRT_FOUND)
  message(STATUS "TensorRT ${tensorrt_version} in ${TENSORRT_INCLUDE_DIR}: with the TensorRT engine")
  target_sources(framestep_core PRIVATE cuda_driver.cpp tensorrt_engine.cpp)
  target_include_directories(framestep_core SYSTEM PRIVATE ${TENSORRT_INCLUDE_DIR} ${CUDA_INCLUDE_DIR})
  target_compile_definitions(framestep_core PRIVATE FRAMESTEP_TENSORRT)
elseif(FRAMESTEP_TENSORRT STREQUAL "ON")
  message(FATAL_ERROR "FRAMESTEP_TENSORRT=ON needs the headers of TensorRT 10.15 or later (found: "
    "${TENSORRT_INCLUDE_DIR} ${tensorrt_version}) and of CUDA, cuda.h and cuda_runtime_api.h (found: ${CUDA_INCLUDE_DIR}); give TENSORRT_INCLUDE_DIR and"
    " CUDA_INCLUDE_DIR")
endif()
