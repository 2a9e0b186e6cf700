const figures = [...document.querySelectorAll('.figure')];
const narrow = matchMedia('(max-width: 700px)');
function plot(element) {
  const { wide, narrow: onPhones } = JSON.parse(element.closest('section').querySelector('script').textContent);
  const { layout } = narrow.matches ? onPhones : wide;
  element.style.height = `${layout.height || 500}px`;
  const options = { responsive: true, displaylogo: false, displayModeBar: narrow.matches ? false : 'hover' };
  return Plotly.newPlot(element, wide.data, layout, options);
}
function draw(index) {
  if (index === figures.length) { document.body.dataset.drawn = 'all'; return; }
  plot(figures[index]).then(() => setTimeout(draw, 0, index + 1));
}
function fit(within) {  // what is drawn while it is folded has no width of its own
  for (const element of within.querySelectorAll('.figure .plot-container')) Plotly.Plots.resize(element.parentElement);
}
function open() {
  const shown = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let place = shown; place; place = place.parentElement) if (place.tagName === 'DETAILS') place.open = true;
  if (shown) shown.scrollIntoView();
}
draw(0);
for (const details of document.querySelectorAll('details')) details.addEventListener('toggle', () => fit(details));
narrow.addEventListener('change', () => draw(0));
addEventListener('hashchange', open);
addEventListener('beforeprint', () => {
  for (const details of document.querySelectorAll('details')) details.open = true;
  fit(document);
});
open();
