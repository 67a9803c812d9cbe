async function drawView(view, page) {
  await addCharts(view.data.charts, page);
}
