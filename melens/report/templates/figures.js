const figures = [...document.querySelectorAll('.figure')];
function draw(index) {
  if (index === figures.length) { document.body.dataset.drawn = 'all'; return; }
  const element = figures[index];
  const { data, layout } = JSON.parse(element.closest('section').querySelector('script').textContent);
  Plotly.newPlot(element, data, layout, { responsive: true, displaylogo: false })
    .then(() => setTimeout(draw, 0, index + 1));
}
draw(0);
window.addEventListener('beforeprint', () => figures.forEach((element) => Plotly.Plots.resize(element)));
